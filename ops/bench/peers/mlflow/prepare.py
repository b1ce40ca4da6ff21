"""Write the joblib file as an MLflow model: python prepare.py MODEL.JOBLIB FOLDER."""

import sys

import joblib
import mlflow.sklearn
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

CATEGORICAL = ["carrier", "origin", "dest"]
NUMERIC = [
    "minute_of_day",
    "day_of_week",
    "distance_miles",
    "temperature_f",
    "dew_point_f",
    "humidity_pct",
    "wind_speed_mph",
    "precipitation_in",
    "pressure_mb",
    "visibility_miles",
    "recent_origin_delay_min",
]

source, folder = sys.argv[1:]
columns = [ColSpec("string", name) for name in CATEGORICAL] + [ColSpec("float", name) for name in NUMERIC]
mlflow.sklearn.save_model(
    joblib.load(source),
    folder,
    # MLflow casts to these types: the model was trained on 32-bit numbers.
    signature=ModelSignature(inputs=Schema(columns)),
    pyfunc_predict_fn="predict_proba",
    # MLflow stores models with skops, which asks for each type that could do harm; this model is our own.
    skops_trusted_types=["sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"],
)
