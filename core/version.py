"""Which release this is, and which wire protocols it speaks."""

VERSION = "0.1.0"

PROTOCOL = 3  # of the control plane; grows when a message changes in a way that defaults do not cover
PIPELINE_PROTOCOL = 3  # the first that knows of pipeline stages: layouts have them, first ranks answer Holds
OLDEST_PROTOCOL = 1  # still understood, so that a fleet can be upgraded replica by replica
