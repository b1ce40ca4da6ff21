"""FastAPI around a joblib file: the way in which most tutorials serve a scikit-learn model."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import joblib
import pandas as pd
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field, NaiveDatetime

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


class Flight(BaseModel):
    """One flight, as it is known two hours before its scheduled departure."""

    model_config = ConfigDict(extra="forbid")

    request_id: str | None = None
    carrier: str = Field(pattern="^[A-Z0-9]{2}$")
    origin: Literal["EWR", "JFK", "LGA"]
    dest: str = Field(pattern="^[A-Z]{3}$")
    scheduled_departure: NaiveDatetime
    distance_miles: float = Field(ge=1, le=6000)
    temperature_f: float | None = Field(None, ge=-60, le=130)
    dew_point_f: float | None = Field(None, ge=-80, le=100)
    humidity_pct: float | None = Field(None, ge=0, le=100)
    wind_speed_mph: float | None = Field(None, ge=0, le=150)
    precipitation_in: float | None = Field(None, ge=0, le=10)
    pressure_mb: float | None = Field(None, ge=850, le=1090)
    visibility_miles: float | None = Field(None, ge=0, le=100)
    recent_origin_delay_min: float | None = Field(None, ge=-120, le=1500)


class Flights(BaseModel):
    """Several flights."""

    flights: list[Flight] = Field(min_length=1, max_length=1000)


class Prediction(BaseModel):
    """The answer for one flight."""

    request_id: str
    prediction: Literal["disrupted", "on_time"]
    probability: float
    threshold: float
    model_version: str


class Predictions(BaseModel):
    """The answers for several flights, in the order of the request."""

    request_id: str
    predictions: list[Prediction]


loaded: dict[str, Any] = {}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Load the model before the first request."""
    folder = Path(os.environ["MODEL_FOLDER"])
    manifest = json.loads((folder / "manifest.json").read_text())
    loaded["pipeline"] = joblib.load(folder / "model.joblib")
    loaded["answer"] = {"threshold": manifest["threshold"], "model_version": manifest["version"]}
    yield
    loaded.clear()


def features(flight: Flight) -> dict[str, Any]:
    """Return what the model was trained on: the request, with the time of day and the day of the week."""
    at = flight.scheduled_departure
    return {**flight.model_dump(), "minute_of_day": at.hour * 60 + at.minute, "day_of_week": at.weekday()}


def score(flights: list[Flight]) -> list[Prediction]:
    """Build one data frame and ask the model once."""
    table = pd.DataFrame([features(flight) for flight in flights], columns=CATEGORICAL + NUMERIC)
    # The model was trained on 32-bit numbers: without this line some probabilities differ by 0.003.
    table[NUMERIC] = table[NUMERIC].astype("float32")
    probabilities = loaded["pipeline"].predict_proba(table)[:, 1].tolist()
    return [
        Prediction(
            request_id=flight.request_id or uuid4().hex,
            prediction="disrupted" if probability >= loaded["answer"]["threshold"] else "on_time",
            probability=probability,
            **loaded["answer"],
        )
        for flight, probability in zip(flights, probabilities, strict=True)
    ]


router = APIRouter(prefix="/v1")


@router.post("/predict")
def predict(flight: Flight) -> Prediction:
    """Score one flight."""
    return score([flight])[0]


@router.post("/predict/batch")
def predict_batch(request: Flights) -> Predictions:
    """Score several flights at once."""
    return Predictions(request_id=uuid4().hex, predictions=score(request.flights))


app = FastAPI(lifespan=lifespan)
app.include_router(router)
