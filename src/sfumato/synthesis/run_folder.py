"""The folder of one run: its config.yaml, when its options may still change, what is already complete."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from sfumato.data.files import write_whole
from sfumato.errors import InputError
from sfumato.privacy.run_account import drop_unused
from sfumato.synthesis.options import SynthesizeOptions

NOT_OF_THE_RUN = ("config", "dry_run", "out")
AFTER_THE_RELEASE = ("holdout", "audit", "audit_policy")  # these only measure what is released
OF_THE_COUNT = ("private", "epsilon", "delta", "unit", "ledger", "skip_unreadable", "public_size")


class RunFolder:
    """`out`: config.yaml and metrics.jsonl beside `release/` and `internal/`; see docs/guide.md."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.checkpoints = out / "internal" / "checkpoints"
        self._config = out / "config.yaml"
        self._evaluation = out / "internal" / "evaluation.json"
        self._plan, self._charged = self.checkpoints / "plan.json", self.checkpoints / "run.json"

    def take(self, options: SynthesizeOptions) -> None:
        """Write config.yaml, or refuse to mix two different runs in one folder.

        Until something is charged all options may change; after the count those that it does not rest on;
        once the plan is fixed only the holdout and the audit; once there is a release no audit can stop it any more.
        """
        values = {
            name: value for name, value in dataclasses.asdict(options).items() if name not in NOT_OF_THE_RUN
        }
        if self._config.exists():
            before = yaml.safe_load(self._config.read_text(encoding="utf-8")) or {}
            changed = [name for name, value in values.items() if before.get(name) != value]
            if self._plan.exists() or self._certificate.exists():
                fixed = [name for name in changed if name not in AFTER_THE_RELEASE]
            else:
                fixed = [name for name in changed if name in OF_THE_COUNT and self._charged.exists()]
            if fixed:
                option = "--" + fixed[0].replace("_", "-")
                raise InputError(
                    f"{self.out} holds a run with {option} {before.get(fixed[0])}, not {values[fixed[0]]}; no "
                    "budget was spent now. Repeat that run's command to resume it, or choose another --out"
                )
            if not changed:
                return
            asked = [name for name in changed if name in AFTER_THE_RELEASE]
            if options.audit and asked and self._certificate.exists():
                was = "was not audited" if "audit" in asked else "was audited with other options"
                raise InputError(
                    f"{self.out} holds a complete release, which {was}; nothing was audited now, and --audit comes too "
                    f"late for it. Run `sfumato audit {self.out} --train {options.private} --holdout "
                    f"{options.holdout}`, or choose another --out"
                )
            if "holdout" in changed:
                for measured in (self._evaluation, self.checkpoints / "accuracy.json"):
                    measured.unlink(missing_ok=True)
            if not self._charged.exists():
                drop_unused(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._write("config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def give_up(self, *, charged: bool) -> None:
        """After a refusal: let other options be tried here. `charged`: something (the count) was bought."""
        self._plan.unlink(missing_ok=True)
        if not charged:
            self._charged.unlink(missing_ok=True)
            self._config.unlink(missing_ok=True)
            drop_unused(self.out)

    def certificate(self) -> dict[str, Any] | None:
        """The privacy.json of a complete release; None when there is none yet."""
        if not self._certificate.exists():
            return None
        return json.loads(self._certificate.read_text(encoding="utf-8"))

    def evaluation(self) -> dict[str, Any] | None:
        """What was measured for the owner (accuracy, notes), the last thing a run writes; None before that."""
        if not self._evaluation.exists():
            return None
        return json.loads(self._evaluation.read_text(encoding="utf-8"))

    def metrics(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl: figures of the public side only."""
        self._write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    @property
    def _certificate(self) -> Path:
        return self.out / "release" / "privacy.json"

    def _write(self, name: str, text: str) -> None:
        write_whole(self.out / name, text.encode())
