"""What every section of the configuration tree is, and how its errors read."""

from pydantic import BaseModel, ConfigDict, ValidationError

MOST_PROBLEMS = 8  # that one message tells of


class Section(BaseModel):
    """Immutable; a misspelt key is an error, as is a number that is none or has no end."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def problems_in(error: ValidationError, whole: str) -> str:
    """One line that names every wrong field, or `whole`."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    told = [f"{'.'.join(map(str, one['loc'])) or whole}: {one['msg']}" for one in found[:MOST_PROBLEMS]]
    more = [f"{len(found) - MOST_PROBLEMS} more"] if len(found) > MOST_PROBLEMS else []
    return "; ".join(told + more)
