"""The composition root: Prefect flows, the MLflow registry and the ``consilium`` command."""
