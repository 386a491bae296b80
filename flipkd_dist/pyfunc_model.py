"""The registered model, run by MLflow as code (no pickle): adapter from the artifacts, base by name and fingerprint."""

from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from flipkd_dist.predict import Matcher


class FlipkdModel(PythonModel):
    """DataFrame with `text_a` and `text_b` in; `p_match`, `similarity` of the read-outs and `match` out."""

    def load_context(self, context) -> None:
        settings = context.model_config or {}
        self.matcher = Matcher(
            Path(context.artifacts["adapter"]), settings.get("base_model"), streamed=settings.get("streamed", False)
        )

    def predict(self, context, model_input: pd.DataFrame, params=None) -> pd.DataFrame:
        texts = list(zip(model_input["text_a"], model_input["text_b"], strict=True))
        p_match, similarity = self.matcher.predict(texts)
        match = p_match >= self.matcher.threshold
        return pd.DataFrame({"p_match": p_match, "similarity": similarity, "match": match})


set_model(FlipkdModel())
