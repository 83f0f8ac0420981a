"""A prefill rank as a plain process: `python -m prefill_worker SPEC.json`."""

from prefill_worker.service import PrefillService
from worker.process import main

if __name__ == "__main__":
    main(PrefillService)
