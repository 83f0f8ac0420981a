"""A decode rank as a plain process: `python -m decode_worker SPEC.json`."""

from decode_worker.service import DecodeService
from worker.process import main

if __name__ == "__main__":
    main(DecodeService)
