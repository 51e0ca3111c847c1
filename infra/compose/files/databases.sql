-- Run once, when the server is made. The first two are those that CONSILIUM_DATABASE_URL names.
CREATE DATABASE consilium_prefect;
CREATE DATABASE consilium_mlflow;
CREATE DATABASE consilium_mlflow_auth;
