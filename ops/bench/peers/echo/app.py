"""FastAPI and nothing else: the same request and the same answer as the service, but no model.

No service that FastAPI routes and pydantic validates can be much faster than this one.
"""

from typing import Literal
from uuid import uuid4

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, ConfigDict, Field, NaiveDatetime


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


class Prediction(BaseModel):
    """The answer for one flight."""

    request_id: str
    prediction: Literal["disrupted", "on_time"]
    probability: float
    threshold: float
    model_version: str


router = APIRouter(prefix="/v1")


@router.post("/predict")
async def predict(flight: Flight) -> Prediction:
    """Answer with constants."""
    return Prediction(
        request_id=flight.request_id or uuid4().hex,
        prediction="on_time",
        probability=0.2377,
        threshold=0.46,
        model_version="1.1.0-rc.1",
    )


app = FastAPI()
app.include_router(router)
