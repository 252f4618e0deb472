"""The doctor: checks that a model can be trained here, one line per check, with what to do where a check fails.

    python -m refine_lab.doctor --model NAME --length 16384

A wrong version, checkpoint or setting often shows only after a long load, or only in the results. The doctor takes
about a minute: packages, weights, head, kernels, the parity gate, an estimate of memory, and two training steps.
"""

from __future__ import annotations

from refine_lab.doctor.examination import Finding, Request, examine

__all__ = ["Finding", "Request", "examine"]
