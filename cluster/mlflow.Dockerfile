# The MLflow server with the client of PostgreSQL, in the versions of constraints.txt. From the repository's root:
#   docker build --file cluster/mlflow.Dockerfile --tag registry.example.com/flipkd-mlflow:0.1.0 .
FROM python:3.11-slim-bookworm
COPY constraints.txt /opt/constraints.txt
RUN pip install --no-cache-dir --constraint /opt/constraints.txt mlflow psycopg2-binary \
    && useradd --uid 1000 --create-home mlflow \
    && install -d -o mlflow /artifacts
USER 1000
WORKDIR /home/mlflow
EXPOSE 5000
CMD ["mlflow", "server", "--help"]
