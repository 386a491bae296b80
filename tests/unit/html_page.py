"""A page as the tests of the reports read it."""

from html.parser import HTMLParser

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page, whose tags have to be balanced."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.attributes, self.texts = [], set(), [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes.extend((tag, *attribute) for attribute in attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes.extend((tag, *attribute) for attribute in attributes)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.texts.append(data)
