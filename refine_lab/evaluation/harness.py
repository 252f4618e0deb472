"""lm-evaluation-harness's own command line with our models: `python -m refine_lab.evaluation.harness ARGS`.

ARGS are those of `lm_eval`, for example `--model refine_lab --model_args pretrained=tiny-deltanet --tasks piqa`.
"""

from __future__ import annotations

from refine_lab.evaluation.packages import harness


def main() -> None:
    """Runs lm_eval's command line on the arguments of this process."""
    harness("__main__").cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"refine_lab.evaluation.harness: {error}") from error
