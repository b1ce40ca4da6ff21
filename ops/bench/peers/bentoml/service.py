"""The model as a BentoML service: bentoml serve service:FlightDisruption."""

import os
from pathlib import Path

import bentoml
import joblib
import pandas as pd
from pydantic import BaseModel

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


class Features(BaseModel):
    """What the model sees of one flight."""

    carrier: str
    origin: str
    dest: str
    minute_of_day: int
    day_of_week: int
    distance_miles: float
    temperature_f: float | None
    dew_point_f: float | None
    humidity_pct: float | None
    wind_speed_mph: float | None
    precipitation_in: float | None
    pressure_mb: float | None
    visibility_miles: float | None
    recent_origin_delay_min: float | None


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class FlightDisruption:
    """Probability of disruption."""

    def __init__(self) -> None:
        """Load the model before the first request."""
        self.pipeline = joblib.load(Path(os.environ["MODEL_FOLDER"]) / "model.joblib")

    def score(self, rows: list[Features]) -> list[float]:
        """Build one data frame and ask the model once."""
        table = pd.DataFrame([row.model_dump() for row in rows], columns=CATEGORICAL + NUMERIC)
        # The model was trained on 32-bit numbers; this also turns None into NaN.
        table[NUMERIC] = table[NUMERIC].astype("float32")
        probabilities: list[float] = self.pipeline.predict_proba(table)[:, 1].tolist()
        return probabilities

    # Adaptive batching: BentoML joins requests that come at the same time, and parts the answers again.
    @bentoml.api(batchable=os.environ["JOIN_REQUESTS"] == "yes")  # type: ignore[untyped-decorator] # bentoml is not installed where types are checked
    def predict(self, rows: list[Features]) -> list[float]:
        """Score one flight: a list with one row."""
        return self.score(rows)

    @bentoml.api  # type: ignore[untyped-decorator] # the same
    def predict_batch(self, rows: list[Features]) -> list[float]:
        """Score several flights at once."""
        return self.score(rows)
