"""`sfumato synthesize --audit`: nothing becomes a release before an audit let it pass.

What the audit sees has no guarantee, and so has its one outcome that others can see: that a release exists at all.
The (epsilon, delta) of the certificate is about what is in the release; docs/guarantees.md says what the gate adds.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.audit.options import AuditOptions
from sfumato.audit.policy import read_policy
from sfumato.audit.run import audit
from sfumato.audit.target import Claim, open_target
from sfumato.data.files import write_whole
from sfumato.data.release import InternalWriter
from sfumato.errors import AuditRefusal, InputError
from sfumato.synthesis.options import SynthesizeOptions
from sfumato.synthesis.privimage import PrivImage

SAID = (
    "This release was audited before it was written, and would not exist had the audit failed. The audit looked at the "
    "protected images without a guarantee: the one bit that it passed is not covered by ε."
)


def check(options: SynthesizeOptions) -> None:
    """Refuse what an audit could not work with, before any budget is spent (InputError)."""
    if options.holdout is None:
        raise InputError(
            "--audit compares with real images that the run does not see; no budget was spent. Give --holdout"
        )
    read_policy(options.audit_policy)


def audited(
    options: SynthesizeOptions,
    model: PrivImage,
    pictures: np.ndarray,
    labels: np.ndarray,
    certificate: dict[str, Any],
) -> None:
    """Audit what is about to be released (images uint8 [N, H, W, C], their labels, the model).

    Raises:
        AuditRefusal: the verdict is not "pass"; exit status 3 or 4.
    """
    out = options.run_folder
    folder = InternalWriter(out).directory("audit/target")
    names = model.generator.label_names if model.generator is not None else ("all",)
    content = io.BytesIO()
    np.savez(content, images=pictures, labels=np.asarray(names)[labels])
    write_whole(folder / "images.npz", content.getvalue())
    target = open_target(str(folder / "images.npz"))
    if model.population is None:  # otherwise the images are the release, and the model is public
        model.save_pretrained(folder / "model")
        target = replace(open_target(str(folder / "model")), images=target.images)
    done = audit(_options(options, folder), replace(target, claim=_claim(certificate)))
    if done.exit_status:
        result = done.result.value
        raise AuditRefusal(
            f"the audit's verdict is {result['verdict']}: {result['sentence']} Nothing was released, what the run made "
            f"is kept, and the budget stays spent; {done.folder / 'report.html'} says why. To go on all the same: run "
            "the command again with another --audit-policy, another --holdout, or without --audit",
            done.exit_status,
        )


def _options(options: SynthesizeOptions, folder: Path) -> AuditOptions:
    return AuditOptions(
        target=str(folder), train=options.private, holdout=options.holdout, policy=options.audit_policy,
        out=str(options.run_folder), seed=options.seed, skip_unreadable=options.skip_unreadable,
    )  # fmt: skip


def _claim(certificate: dict[str, Any]) -> Claim:
    return Claim(**{name: certificate[name] for name in ("epsilon", "delta", "unit", "relation")})
