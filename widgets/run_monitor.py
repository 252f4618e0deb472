"""The run monitor: a table of a folder's runs, their differences, curves and rollouts, and buttons that start and stop runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import traitlets

from refine_lab.data.sample import sample_document
from refine_lab.experiments.compare import config_differences, evaluation_results, lineage, tokenizer_of
from refine_lab.experiments.stored_scores import answer_files
from refine_lab.models.hub import IN_RUNS
from refine_lab.runs.files import is_run, parquet_parts
from refine_lab.runs.process import request_stop
from refine_lab.runs.queue import run_in_turn
from refine_lab.runs.run import Run, list_runs, runs_dir
from refine_lab.text import printable
from refine_lab.validation import path_of, require
from widgets.core.base import guarded, sentence
from widgets.core.notice import Notice
from widgets.core.page import About, save_page
from widgets.core.panel import Panel
from widgets.figures.tables import Table
from widgets.memory_view import MemoryView
from widgets.parts.controls import field
from widgets.parts.live_curves import LiveCurves
from widgets.parts.model_picker import run_words
from widgets.parts.page_about import run_facts, shared_settings
from widgets.parts.run_comparison import RunComparison, run_labels
from widgets.parts.run_rows import RECALL, STATES
from widgets.parts.run_table import RunTable
from widgets.parts.step_slider import StepSlider
from widgets.parts.text_tables import TextTables
from widgets.rollout_inspector import RolloutInspector

NEWEST = 4
"""Number of newest runs selected initially if none of their experiment has finished or is in progress."""

MOST_CHOSEN = 24
"""Maximum number of runs selected initially."""

TOOLTIPS = {
    "refresh": "Refresh the list of runs",
    "start": "Start or resume the selected unfinished runs (training runs, or runs that answer prompts); they keep running "
    "after this kernel ends",
    "stop": "Make the selected runs save and stop",
}
"""Tooltips of the buttons, by the method that they call."""

DIFFERING = "Differing settings"
"""Caption of the table of `refine_lab.experiments.compare.config_differences`."""

LINEAGE = "Forks and accepted changes"
"""Caption of the table of `refine_lab.experiments.compare.lineage`."""

EVALUATIONS = "Evaluations"
"""Caption of the table of `refine_lab.experiments.compare.evaluation_results`."""

PAGE_ROLLOUTS = 20_000
"""Approximate number of rollouts on an offline page."""


class RunMonitor(Panel):
    """Lists runs in a table, compares those selected, follows their curves, shows rollouts, and stops and starts runs.

    `table.selected` holds the names of the selected runs. `folder`: the folder of run directories; none: the project's
    (`runs.run.runs_dir`). Everything shown is read from the directories, so that a new monitor, after a restart of the
    kernel or a reload, shows the same, and can stop runs that it did not start. Runs of training and test-time training
    are shown alike, the latter with the means of their answers so far. Raises FileNotFoundError if the folder does not
    exist.
    """

    def __init__(self, folder: Path | str | None = None, runs: Sequence[Run] | None = None) -> None:
        """`runs` are selected initially; none: those of the newest experiment (`_first_choice`).

        `folder` may also be a run directory, which is then selected.
        """
        super().__init__()
        self.folder = path_of("folder", folder) if folder is not None else runs_dir()
        if is_run(self.folder):
            runs = [Run(self.folder)] if runs is None else runs
            self.folder = self.folder.absolute().parent
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no runs folder at {self.folder}")
        self.table = RunTable(opens_memory=True)
        self.memory: MemoryView | None = None
        "The memory view, once a run's memory has been shown."
        self._opened = ""
        self._below_table = ipywidgets.VBox()
        self._below_table.add_class("refine-between")
        self.comparison = RunComparison()
        self.curves = LiveCurves()
        self.curves.listed = False
        self.inspector = RolloutInspector(decode=str)
        self._run: Run | None = None
        self._compared: Any = None
        self._choosing = False
        self.step = StepSlider(label="rollouts at step", disabled=True)
        self.rolled_out = field(ipywidgets.Dropdown, "rollouts of", None, "34em", options=[])
        self.rolled_notice = Notice()
        self.differences = ipywidgets.HTML()
        scrolls = ipywidgets.Box([self.differences], layout=ipywidgets.Layout(max_height="24em", overflow="auto"))
        buttons = ipywidgets.HBox([self.button(method, tooltip) for method, tooltip in TOOLTIPS.items()])
        shown = [
            self.table,
            buttons,
            self.notice,
            self._below_table,
            self.comparison,
            self.curves,
            scrolls,
            self.rolled_out,
        ]
        self.children = [*shown, self.step, self.rolled_notice, self.inspector]
        self.refresh()
        if any(RECALL in row["metrics"] for row in self.table.rows):
            self.table.sort = [f"metric:{RECALL}", True]
        self.table.observe(self._on_choice, "selected")
        self.table.observe(self._on_memory, "opened")
        self.step.observe(self._on_step, "value")
        self.rolled_out.observe(self._on_run, "value")
        self.curves.observe(self._on_progress, "progress")
        traitlets.dlink((self.table, "hidden"), (self.curves, "hidden"))
        self.table.selected = [run.name for run in runs] if runs is not None else self._first_choice()
        if not self.table.selected:
            self._on_choice(None)

    # -- public methods ------------------------------------------------------------------------------------------------

    @property
    def runs(self) -> list[Run]:
        """Returns the selected runs that still exist."""
        return [Run(self.folder / name) for name in self.table.selected if is_run(self.folder / name)]

    def _first_choice(self) -> list[str]:
        """Returns the runs of the newest experiment, with all seeds, that have finished or are in progress.

        If there is none, these are the newest runs.
        """
        rows = self.table.rows
        newest = [row for row in rows if row["experiment"] == rows[0]["experiment"]]
        begun = [row for row in newest if row["state"] in ("finished", "running", STATES["starting"])]
        return [row["name"] for row in begun[:MOST_CHOSEN] or rows[:NEWEST]]

    def refresh(self) -> None:
        """Refreshes the list of runs and keeps the selection."""
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            runs = list_runs(self.folder)
        before = self.table.selected
        self.table.show([*reversed(runs)])
        if self.table.selected == before:
            self.curves.add()  # recall and evaluations may have been added
            self._show_tables()
        self.report(f"{_runs(runs)}.")
        self.error = printable("\n".join(str(warning.message) for warning in damaged))

    def start(self) -> None:
        """Starts the selected unfinished runs, one after another, in a process that outlives the kernel."""
        waiting = [run for run in self.runs if run.state not in ("starting", "running", "finished")]
        run_in_turn(waiting, detach=True, log=lambda line: None)
        self.follow()
        self.report(f"Started {_runs(waiting)}." if waiting else "All selected runs have finished or are in progress.")

    def stop(self) -> None:
        """Asks the selected runs to save and stop, without waiting for them."""
        living = request_stop(self.runs)
        self.report(
            f"Asked {_runs(living)} to save and stop." if living else "None of the selected runs is in progress."
        )

    def show_memory(self, name: str | None) -> MemoryView | None:
        """Shows below the table where the answers of a run's last checkpoint come from; None hides it.

        The view opens with the sample document and its question; for another run it keeps the document that it shows.
        Raises ValueError for a run that is not in the table or has no checkpoint.
        """
        saved = [row["name"] for row in self.table.rows if row["saved"]]
        require(name is None or name in saved, "the run", name, "a run of the table with a checkpoint")
        if name is not None:
            path = self.folder.absolute() / name
            model = f"{IN_RUNS}{name}" if self.folder.resolve() == runs_dir().resolve() else str(path)
            if self.memory is None:
                self.memory = MemoryView(model, answer=sample_document().answer)
            else:
                self.memory.shown = self.memory.switch(model)
        self._below_table.children = (self.memory,) if name is not None and self.memory is not None else ()
        self._opened = name or ""
        self.table.opened = self._opened
        self.report(printable(f"The memory of {run_words(Run(path))}:") if name is not None else "")
        return self.memory

    def follow(self) -> None:
        """Follows the runs in the table and the curves, also runs that had ended and have been resumed."""
        self.table.start()
        self.curves.start()

    def stop_following(self) -> None:
        """Reads the runs once more and stops following them; the runs themselves continue."""
        self.table.stop()
        self.curves.stop()

    def close(self) -> None:
        """Stops following the runs and closes the monitor."""
        self.table.close()
        self.curves.close()
        if self.memory is not None:
            self.memory.close()
        super().close()

    def save_html(
        self, path: Path | str, title: str = "Runs", *, more: Sequence[Table | None] = (), conclusion: str = ""
    ) -> Path:
        """Writes one offline HTML file with the selected runs: their table, conclusion, curves, and one run's last rollouts.

        The other tables are `more`, such as scores and answers (None is left out), those of the monitor (settings that
        differ, forks and accepted changes, evaluations), and the settings that the runs share. `conclusion` is a
        sentence at the top.
        """
        shown_tables = [*(table for table in more if table is not None), *self._tables(), shared_settings(self.runs)]
        if self._compared != self._compared_state():
            self._compare()
        rollouts, caption, tables = self._all_rollouts(), Notice(), TextTables.of(shown_tables)
        runs, conclusions = self.table.copy_of(self.table.selected), TextTables.of(self._conclusions())
        about = About(conclusion=conclusion, facts=run_facts(self.runs))
        steps = rollouts.rollouts["step"]
        if len(steps):
            caption.status = printable(f"Rollouts of {self._description()} at steps {steps.min()} to {steps.max()}.")
        try:
            above = (runs, conclusions) if conclusions.tables else (runs,)
            shown = (*above, self.curves, tables, caption, rollouts)
            links = [(runs, "hidden", self.curves, "hidden")]
            return save_page(path, *shown, title=title, links=links, about=about)
        finally:
            for widget in (rollouts, caption, tables, runs, conclusions):
                widget.close()  # an executed notebook stores every open widget

    def _all_rollouts(self) -> RolloutInspector:
        """Returns an inspector with the rollouts of as many last steps as fill a page."""
        if self._run is None:
            return RolloutInspector(decode=str)
        steps = max(1, PAGE_ROLLOUTS // max(1, len(self.inspector.rollouts)))
        first = max(self.step.first, self.step.last - steps + 1)
        return RolloutInspector.of_run(self._run, self._decoder(self._run), range(first, self.step.last + 1))

    def __repr__(self) -> str:
        chosen = ", ".join(self.table.selected) or "none"
        parts = [
            f"RunMonitor of {_runs(self.table.rows)}; selected: {chosen}",
            *self.notice.lines(),
            repr(self.table),
            repr(self.comparison),
        ]
        parts += [repr(table) for table in self._tables()[1:] if len(table.data)]
        if self.inspector.rollouts.size:
            parts += [f"rollouts of {self._description()} at step {self.step.value}", repr(self.inspector)]
        parts += [repr(self.memory)] if self.memory is not None and self._opened else []
        return printable("\n".join(parts))

    # -- events of the page --------------------------------------------------------------------------------------------

    @guarded
    def _on_choice(self, change: Any) -> None:
        self.curves.show(*self.runs)
        self._show_tables()
        self._show_steps()

    @guarded
    def _on_memory(self, change: Any) -> None:
        if change["new"] == self._opened:
            return
        try:
            self.show_memory(change["new"] or None)
        except (OSError, ValueError):
            self.table.opened = self._opened
            raise

    def _conclusions(self) -> list[Table]:
        """Returns the conclusion about the selected runs, if there is one."""
        return [] if self.comparison.found is None else [self.comparison.found]

    def _tables(self) -> list[Table]:
        """Returns the settings in which the selected runs differ, their forks and changes, and their evaluations."""
        runs = self.runs
        labels = run_labels(runs)
        differing = config_differences(runs).rename(columns=labels)
        tables = [Table(differing, DIFFERING, helps={label: name for name, label in labels.items()})]
        return [*tables, Table(lineage(runs), LINEAGE), Table(evaluation_results(runs), EVALUATIONS)]

    def _show_tables(self) -> None:
        self.differences.value = "".join(table._repr_html_() for table in self._tables() if len(table.data))  # escaped
        self._compare()

    def _compare(self) -> None:
        """Compares the selected runs as they are now."""
        self._compared = self._compared_state()
        self.comparison.show(self.runs)

    def _compared_state(self) -> Any:
        """Returns what the comparison depends on: the runs, their states, their evaluations and answers."""
        states = [(row["name"], row["state"]) for row in self.curves.progress]
        return (
            states,
            [answer_files(run) for run in self.runs],
            len(self.curves.frame("eval")),
            len(self.curves.frame("answers")),
        )

    @guarded
    def _on_progress(self, change: Any) -> None:
        self._show_steps()
        if self._compared != self._compared_state():
            self._compare()

    def _show_steps(self) -> None:
        """Sets the slider to the steps with rollouts of the run chosen for them: the first selected one that has any."""
        parts = {run: found for run in self.runs if (found := parquet_parts(run.path / "rollouts"))}
        named = {run.name: run for run in parts}
        options, before = [(self._label(run), run.name) for run in parts], self.rolled_out.value
        if options != [*self.rolled_out.options]:
            self._choosing = True
            try:
                self.rolled_out.options = options
                self.rolled_out.value = before if before in named else next(iter(named), None)
            finally:
                self._choosing = False
        self.rolled_out.layout.display = None if len(parts) > 1 else "none"
        run = named.get(str(self.rolled_out.value))
        steps = parts[run] if run is not None else []
        first, last = min((first for first, *_ in steps), default=0), max((last for _, last, _ in steps), default=0)
        changed = (run and run.path) != (self._run and self._run.path)
        if changed and run is not None:
            self._run = run
            before, self.inspector = self.inspector, RolloutInspector(decode=self._decoder(run))
            self.children = [*self.children[:-1], self.inspector]
            before.close()
        self.step.label = f"{self._label(run)}, rollouts at step" if run is not None else "rollouts at step"
        if changed or last != self.step.last:
            follows = changed or self.step.value == self.step.last  # a selected earlier step remains selected
            self.step.disabled = run is None
            with self.step.hold_trait_notifications():
                self.step.first, self.step.last = first, last
                self.step.value = last if follows else self.step.value
        if changed and run is not None:
            self._on_step({"new": last})

    @guarded
    def _on_run(self, change: Any) -> None:
        if not self._choosing:
            self._show_steps()

    @guarded
    def _on_step(self, change: Any) -> None:
        if self._run is not None:
            rollouts = self._run.rollouts([change["new"]])
            self.inspector.show(rollouts)
            count = f"{len(rollouts)} rollout{'' if len(rollouts) == 1 else 's'}"
            self.rolled_notice.status = printable(f"{count} of {self._description()} at step {change['new']}.")

    def _decoder(self, run: Run) -> Any:
        """Returns a run's tokenizer, or `str`, with which token ids are shown, if it has none here."""
        try:
            return tokenizer_of(run)
        except (OSError, ValueError) as error:
            self.error = sentence(error)
            return str

    def _description(self) -> str:
        """Returns label and folder of the run whose rollouts are shown."""
        return f"{self._label(self._run)} ({self._run.name})" if self._run is not None else "no run"

    def _label(self, run: Run) -> str:
        """Returns the run's label in the curves."""
        return next((row["label"] for row in self.curves.progress if row["name"] == run.name), run.name)


def _runs(counted: Sequence[Any]) -> str:
    return "1 run" if len(counted) == 1 else f"{len(counted)} runs"
