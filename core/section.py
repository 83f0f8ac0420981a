"""What every section of the configuration tree is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
