"""What the commands say to people: the summary of each program as lines of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pipelines.extraction.label_counts import LabelCounts, classes_text
from pipelines.extraction.tally import bottleneck_text
from tec_cache.codec.quality import errors_text
from tec_cache.config import TrainConfig
from tec_cache.data.passed_over import passed_over_text
from tec_cache.errors import listed
from tec_cache.printable import block, counted, shell_words
from tec_cache.progress import human_bytes, human_seconds

if TYPE_CHECKING:
    from pipelines.extraction.extract_summary import Summary
    from pipelines.index import IndexSummary
    from pipelines.merge import MergeSummary
    from pipelines.pack import PackSummary
    from pipelines.planning.result import Plan
    from pipelines.probe import ProbeSummary
    from pipelines.remove import RemoveSummary
    from pipelines.train import TrainSummary
    from pipelines.unpack import UnpackSummary
    from pipelines.verify import Verdict
    from tec_cache.config import ExtractConfig


NEGLIGIBLE = 0.001
"""Relative errors of stored targets below this move no loss that is printed."""


def lower_loss(error: float) -> str:
    """Say what a relative error of stored features does to the loss of a training; empty where that is nothing."""
    if error <= NEGLIGIBLE:
        return ""
    return f"lossy targets lower the feature loss by up to about {error:.2g}: not comparable with --online"


def facts_text(facts: list[list[str]]) -> list[str]:
    """Say what a base assumes that no shape shows, and who says so."""
    first = "base "
    lines = []
    for name, value, origin in facts:
        lines.append(f"{first:<12} {name:<11} {value}{f'  ({origin})' if origin else ''}")
        first = ""
    return lines


def computed_text(computed: Mapping[str, Any]) -> str:
    """Say on what targets are computed, and when another computation gives the same bytes."""
    text = f"{computed['device']}, {computed['precision']}, batches of {computed['batch_size']}"
    if computed["threads"] is None:
        return f"{text}; reproducible byte for byte on the same GPU model with the same library versions"
    threads = counted(computed["threads"], "thread")
    return f"{text}; reproducible byte for byte with {threads}, however many cores there are"


def extract_text(summary: Summary, dry_run: bool, config: ExtractConfig, alone: bool) -> str:
    """Say what an extraction did and what the cache holds now."""
    source = f", {human_bytes(summary.source_bytes)}" if summary.source_bytes else ""
    files = "single files, taken as " if summary.source_files else ""
    unread = f", {summary.shards_left} not read to the end yet" if summary.shards_left else ""
    lines = [
        f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
        f"source       {files}{counted(summary.source_shards, 'shard')}{source}{unread}",
        f"views        {summary.num_views} of each photo; {counted(summary.photos, 'photo')} in "
        f"{counted(summary.units, 'unit')}{' so far' if summary.missing or summary.shards_left else ''}",
    ]
    lines.append(f"classes      {classes_text(summary.labels)}")
    if summary.passed_over:
        lines.append(f"passed over  {passed_over_text(summary.passed_over)}")
    lines += [f"note         {remark}" for remark in summary.remarks]
    if summary.bytes_per_crop:
        lines.append(f"crops        {human_bytes(summary.bytes_per_crop)} per view")
    if summary.bytes_per_target:
        lines.append(f"targets      {summary.target}: {human_bytes(summary.bytes_per_target)} per view")
    elif summary.most_bytes_per_target:
        lines.append(f"targets      {summary.target}: at most {human_bytes(summary.most_bytes_per_target)} per view")
    lines += facts_text(summary.facts)
    if summary.computed:
        lines.append(f"computed on  {computed_text(summary.computed)}")
    if summary.target:
        lines += _quality_lines(summary)
    if summary.first_row not in ("", "class token"):
        lines.append(f"row 0        {summary.first_row}")
    if summary.skipped:
        lines.append(f"left out     {len(summary.skipped)}:")
        lines += [f"  {shard} {key}: {reason}" for shard, key, reason in summary.skipped[:10]]
        if len(summary.skipped) > 10:
            lines.append("  ... all of them with --json")
    lines += _notes_text(summary.notes)
    if summary.free_disk is not None:
        lines.append(f"free disk    {human_bytes(summary.free_disk)}")
    if dry_run:
        more = " and those of the unread shards" if summary.shards_left else ""
        if summary.to_remove:
            lines.append(
                f"to remove    target set {summary.target}: {counted(summary.to_remove, 'finished unit')}, its codec"
            )
        lines.append(f"to do        {counted(summary.missing, 'unit')}{more}")
        return block([*lines, "dry run: nothing was written"])
    lines += _kept_text(summary.foreign, "cache")
    seconds = human_seconds(summary.seconds)
    who = "this run    " if alone else "this part   "
    lines.append(f"{who} {counted(summary.views_made, 'crop')}, {counted(summary.targets_made, 'target')} in {seconds}")
    if summary.views_made or summary.targets_made:
        lines.append(f"stages       {bottleneck_text(summary.busy)}")
    if summary.missing and not alone:
        lines.append(f"other parts  {counted(summary.missing, 'unit')} still to be finished by them")
    if summary.missing and not alone:
        lines.append("next         the other parts; then tec-cache merge, where they lie in folders of their own")
    elif config.views_only:
        lines.append(f"next         tec-cache extract {shell_words(['--cache', summary.cache])} --base mae")
    else:
        target = f" --target {summary.target}" if summary.num_targets > 1 else ""
        small = smaller_batch(summary.photos)
        lines.append(f"next         tec-cache train {shell_words(['--cache', summary.cache])}{target} --out RUN{small}")
    return block(lines)


def smaller_batch(photos: int) -> str:
    """Return the option that a training needs where its usual batch is larger than an epoch."""
    usual: Any = next(field.default for field in fields(TrainConfig) if field.name == "batch_size")
    return "" if photos >= usual or photos < 1 else f" --batch-size {2 ** (photos.bit_length() - 1)}"


def _quality_lines(summary: Summary) -> list[str]:
    errors = errors_text(summary.errors, summary.asked_errors, summary.checked_views)
    lines = f"quality      {summary.quality}{errors}".splitlines()
    lower = lower_loss(summary.errors.get("mse", 0.0))
    return [*lines, f"training     {lower}"] if lower else lines


def _kept_text(foreign: list[str], whose: str) -> list[str]:
    """Say what stays in a folder because it is others'."""
    return [f"kept         what is not this {whose}'s, {listed(foreign)}"] if foreign else []


def _notes_text(notes: list[list[str]], most: int = 5) -> list[str]:
    """Say which whole photos hold something that was not understood, each kind of remark once."""
    if not notes:
        return []
    first: dict[str, str] = {}
    for shard, key, text in notes:
        first.setdefault(text, f"{shard} {key}")
    counts = Counter(text for _, _, text in notes)
    lines = [f"noted        {counted(len({(shard, key) for shard, key, _ in notes}), 'photo')} used in spite of it:"]
    lines += [f"  {text}: {count:,}, the first {first[text]}" for text, count in counts.most_common(most)]
    if len(counts) > most:
        lines.append("  ... all of them with --json")
    return lines


def plan_text(plan: Plan) -> str:
    """Say what an extraction and a training will take."""
    amount, free = plan.amount, plan.free
    room = "" if free is None else f", {human_bytes(free)} are free: {'it fits' if plan.fits else 'IT DOES NOT FIT'}"
    about = "about " if amount.estimated else ""
    lines = [
        f"cache        {plan.cache}, {human_bytes(amount.bytes_there)} there already",
        f"photos       {about}{amount.photos:,}, {counted(amount.num_views, 'view')} of each"
        + (" (part of the shards was counted, the rest is by their bytes)" if amount.estimated else ""),
        f"classes      {classes_text(plan.labels)}",
        *([f"passed over  {passed_over_text(plan.passed_over)}"] if plan.passed_over else []),
        *(f"note         {remark}" for remark in plan.remarks),
        f"crops        {human_bytes(plan.views.written.num_bytes)} per view, measured; "
        f"{amount.crops_left:,} to write: {human_bytes(plan.bytes_crops)}",
    ]
    if plan.targets:
        once = plan.targets.codec_bytes
        codec = f", and {human_bytes(once)} once for the codec" if once else ""
        lines.append(
            f"targets      {human_bytes(plan.bytes_per_target)} per view, measured on {plan.targets.views} "
            f"({plan.target}, quality {plan.quality}); {amount.targets_left:,} to write: "
            f"{human_bytes(plan.bytes_targets - plan.targets.codec_bytes)}{codec}"
        )
    lines += facts_text(plan.facts)
    if lower := lower_loss(plan.asked_errors.get("mse", 0.0)):
        lines.append(f"training     {lower}")
    lines += [f"disk         {human_bytes(plan.bytes_needed)} are needed{room}", ""]
    how = "beside the base's device" if plan.targets and plan.targets.own_device else "on the same cores"
    lines += [f"extraction   stages run at once, {how}; time of each on its own, at its measured rate"]
    rates = plan.rates
    for name, seconds in plan.seconds.items():
        mark = "  <- bottleneck" if name == plan.bottleneck else ""
        lines.append(f"  {name:<22} {human_seconds(seconds):>14} {rates.get(name, ''):>22}{mark}".rstrip())
    lines.append(f"  {'together':<22} {human_seconds(plan.total_seconds):>14}")
    if plan.training:
        lines += ["", *_training_text(plan)]
    if plan.views.broken:
        lines += ["", f"broken       {len(plan.views.broken)} of {counted(plan.views.sampled, 'photo')} looked at:"]
        lines += [f"  {text}" for text in plan.views.broken[:5]]
        lines.append("  extract stops at the first one; with --on-error skip it leaves them out")
    if plan.fits is False:
        lines += ["", "THE DISK IS TOO SMALL: use another --cache, fewer --views or a smaller --quality"]
    lines += ["", f"nothing was written; measured in {human_seconds(plan.measured_seconds)}"]
    return block(lines)


def _training_text(plan: Plan) -> list[str]:
    assert plan.training is not None
    training, flop, slowest = plan.training, plan.flop, plan.training.bottleneck(plan.batch_size)
    lines = [
        f"training     time of 1 epoch and of {plan.epochs}, measured with micro-batches of {training.micro_batch}; "
        "<- the slowest part"
    ]
    for name, seconds in plan.epoch_seconds.items():
        run = human_seconds(seconds * plan.epochs)
        lines.append(f"  {name:<22} {human_seconds(seconds):>14} {run:>22}  <- {slowest[name]}")
    lines += [
        f"arithmetic   {training.base_macs / 1e9:.3g} GMAC per view in the base; "
        f"{training.step_macs / 3e9:.3g} x 3 GMAC per view in a training step",
        f"             extraction {flop['extraction']:.2e} FLOP; {counted(plan.epochs, 'epoch')} cached "
        f"{flop['cached_run']:.2e}, online {flop['online_run']:.2e} ({flop['online_run'] / flop['cached_run']:.2f} "
        "times as many)",
    ]
    epochs = plan.break_even_epochs
    if epochs is None:
        lines.append("paid back    never in time: on this machine a cached epoch takes as long as one online")
    else:
        lines.append(
            f"paid back    after {epochs:,.1f} epochs ({epochs / plan.epochs:.2f} times "
            f"{counted(plan.epochs, 'epoch')})"
        )
    return lines


def train_text(summary: TrainSummary, dry_run: bool, go_on: str) -> str:
    """Say what a training did; go_on: the command that does the rest."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in summary.losses.items())
    lines = [
        f"run          {summary.run}",
        f"student      {counted(summary.parameters, 'parameter')} with adapters and decoder, "
        f"{summary.trained_parameters:,} trained",
        f"steps        {summary.steps:,} of {summary.total_steps:,}, in micro-batches of {summary.micro_batch:,}",
    ]
    lines += [f"{'began with' if i == 0 else '':<12} {line}" for i, line in enumerate(_init_text(summary.init))]
    for one in summary.extensions:
        epochs = f"{one['from_epochs']:,} to {counted(one['to_epochs'], 'epoch')}"
        lines.append(f"lengthened   from {epochs} at step {one['from_step']:,}")
    if summary.left_out:
        lines.append(f"left out     {counted(summary.left_out, 'view')} of each epoch in no batch, others each time")
    if losses:
        lines.append(f"losses       {losses}  (step {summary.losses_step:,})")
    for name, error in summary.target_errors.items() if losses else ():
        if lower := lower_loss(error):
            name_of = f"{name}: " if len(summary.target_errors) > 1 else ""
            lines.append(f"{'':<13}{name_of}{lower} (docs/fidelity.md)")
    if summary.gradients:
        norms = ", ".join(f"{name} {norm:.3g}" for name, norm in summary.gradients.items())
        lines.append(f"gradients    {norms}: their norms at the encoder's output, weighted, as last measured")
        if summary.dwarfed:
            lines.append(f"             {summary.dwarfed}: see --balance norm, or give weights NAME:WEIGHT")
    if summary.scores:
        knn, linear, step = (summary.scores[name] for name in ("probe_knn", "probe_linear", "step"))
        lines.append(f"judged       kNN {knn:.2%}, linear {linear:.2%} at step {int(step):,}")
    lines += [f"{'probes' if i == 0 else '':<12} {remark}" for i, remark in enumerate(summary.remarks)]
    if dry_run:
        lines.append("dry run: nothing was written")
    else:
        if summary.images_per_second:
            speed = f"{summary.images_per_second:,.1f} images/s in {human_seconds(summary.seconds)}"
            lines.append(f"speed        {speed}, {summary.waited:.1%} of it waiting for the loader")
        else:
            lines.append("nothing left to do: this run had reached its last step")
        if summary.damaged:
            lines.append(f"damaged      {counted(len(summary.damaged), 'block')}; other rows stood in:")
            lines += [f"  {place}" for place in summary.damaged[:10]]
        lines += _kept_text(summary.foreign, "run")
        if summary.finished:
            left = summary.total_steps - summary.steps
            if left:
                going = f"tec-cache train {shell_words(['--out', summary.run])}"
                lines.append(f"left         {counted(left, 'step')} of the schedule, after --steps: {going} goes on")
            lines.append(f"next         tec-cache export {shell_words([summary.run])} OUT")
        else:
            lines += ["interrupted: the checkpoint is kept; go on with", f"  {go_on}"]
    return block(lines)


def _init_text(init: dict[str, Any] | None) -> list[str]:
    """Say what a run took of another model, and what stayed random."""
    if init is None:
        return []
    lines = [f"{', '.join(init['taken'])} of a{'n' * (init['kind'] == 'export')} {init['kind']}, step {init['step']:,}"]
    return lines + ([f"random: {', '.join(init['random'])}"] if init["random"] else [])


def probe_text(summary: ProbeSummary, neighbours: int) -> str:
    """Say how a model was judged."""
    converged = "" if summary.linear_converged else "  (not converged: raise --l2)"
    names = f": {named(summary.class_names)}" if summary.class_names else ", numbers without names"
    lines = [
        f"model        {summary.model}",
        f"images       {summary.train_images:,} to learn from, {summary.test_images:,} to judge on",
        f"classes      {summary.classes:,}{names}",
    ]
    if summary.remark:
        lines.append(f"             {summary.remark}")
    if summary.skipped:
        lines.append(f"left out     {summary.skipped:,}:")
        lines += [f"  {number:,} {kind}" for kind, number in summary.left_out.items()]
    if summary.noted:
        lines.append(f"used         {sum(summary.noted.values()):,} of which something was not understood:")
        lines += [f"  {number:,} {kind}" for kind, number in summary.noted.items()]
    lines += [
        f"kNN          {summary.knn:.2%}  (k = {neighbours})",
        f"linear       {summary.linear:.2%}{converged}",
    ]
    return block(lines)


def named(names: Sequence[str], most: int = 5) -> str:
    """Return the first few names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _left_out(found: dict[str, Any]) -> list[str]:
    skipped, noted = found["skipped_photos"], found["noted_photos"]
    parts = [f"{counted(skipped, 'photo')} skipped"] if skipped else []
    parts += [f"{counted(noted, 'photo')} used with remarks"] if noted else []
    return [f"left out     {'; '.join(parts)}"] if parts else []


def info_text(found: dict[str, Any]) -> str:
    """Say what a cache holds."""
    photos = found["views"][0]["photos"] if found["views"] else 0
    lines = [
        f"cache        {found['cache']}  ({found['fingerprint'][:12]})",
        f"views        {counted(photos, 'photo')}, {counted(found['num_views'], 'view')} of {found['size']} pixels, "
        f"{human_bytes(sum(v['bytes'] for v in found['views']))}",
        f"classes      {classes_text(LabelCounts(**found['labels']))}",
        *_left_out(found),
        *([f"passed over  {passed_over_text(found['passed_over'])}"] if found["passed_over"] else []),
        f"missing      {counted(found['missing_units'], 'unit') + ' of views' if found['missing_units'] else 'nothing'}"
        + (
            f", and all of {counted(found['unread_shards'], 'source shard')} not read to the end"
            if found["unread_shards"]
            else ""
        ),
    ]
    for name, target in found["targets"].items():
        lines.append(
            f"targets      {name}: base {target['base']}, quality {target['quality']}, {target['normalization']}, "
            f"k {'none' if target['k'] is None else target['k']}, {human_bytes(target['bytes_per_view'])} per view"
        )
        errors = errors_text(target["errors"], target["asked_errors"], target["checked_views"]).removeprefix(": ")
        lines += facts_text(target["facts"])
        lines.append(f"computed on  {computed_text(target['computed'])}")
        lines += f"quality      {errors or 'its codec is not fitted yet'}".splitlines()
        if lower := lower_loss(target["errors"].get("mse", 0.0)):
            lines.append(f"training     {lower}")
        lines.append(
            f"there        {counted(target['finished_units'], 'unit')} finished, {target['missing_units']} missing; "
            f"{human_bytes(target['bytes'])}"
        )
    return block(lines)


def verify_text(verdict: Verdict, full: bool, most: int = 20) -> str:
    """Say what verifying found and did."""
    report, found = verdict.report, verdict.findings
    targets = "".join(f", {units:,} of {name}" for name, units in report.target_units.items())
    lines = [
        f"cache        {verdict.cache}",
        f"looked at    {counted(report.files, 'file')} of records and manifests, {counted(report.payloads, 'payload')} "
        f"({human_bytes(report.num_bytes)}, {'every byte' if full else 'their sizes'}), "
        f"in {human_seconds(verdict.seconds)}",
        f"units        {report.view_units:,} of views{targets}",
    ]
    for base in verdict.base:
        if not base["views"]:
            lines.append(f"base         {base['target']}: nothing could be compared")
            continue
        figures = ", ".join(
            f"{name} {base['measured'][name]:.3g} (stated {base['stated'][name]:.3g})" for name in base["stated"]
        )
        rest = ", ".join(
            f"{name.replace('_', ' ')} {base['measured'][name]:.4f}"
            for name in ("cosine", "rows_alike")
            if name in base["measured"]
        )
        lines.append(f"base         {base['target']}: {figures}, {rest};")
        lines.append(f"             on {counted(base['views'], 'view')} of {counted(base['units'], 'unit')}")
    if verdict.dropped or verdict.removed:
        lines.append(f"dropped      {len(verdict.dropped)} bad, {len(verdict.removed)} left over:")
        lines += [f"  {finding.where}: {finding.what}" for finding in verdict.dropped[:most]]
    lines += [f"{level:<12} {verdict.count(level)}" for level in ("damage", "missing", "note") if verdict.count(level)]
    todo = ""
    for finding in sorted(found, key=lambda f: ("damage", "missing", "note").index(f.level))[:most]:
        lines.append(f"  {finding.kind}: {finding.where}: {finding.what}")
        if finding.todo != todo:
            lines.append(f"    to do: {finding.todo}")
        todo = finding.todo
    if len(found) > most:
        lines.append(f"  ... and {len(found) - most} more (--json)")
    if verdict.clean:
        lines.append("nothing is wrong, nothing is missing" + ("" if full else "; contents were not read: --full"))
    lines += [f"go on with   {command}" for command in verdict.next]
    return block(lines)


def index_text(summary: IndexSummary) -> str:
    """Say what was indexed."""
    sets = ", ".join(f"{name} ({counted(views, 'view')})" for name, views in summary.targets.items()) or "none"
    lines = [
        f"cache        {summary.cache}",
        f"indexed      {counted(summary.num_views, 'view')} in {counted(summary.units, 'unit')}; target sets: {sets}",
        f"written      {', '.join(summary.written)}: {human_bytes(summary.bytes)} in {summary.seconds:.1f} s",
    ]
    return block(lines)


def pack_text(summary: PackSummary) -> str:
    """Say what was packed."""
    lines = [
        f"pack         {summary.pack}  ({summary.fingerprint[:12]})",
        f"holds        {counted(summary.samples, 'sample')} in {counted(summary.units, 'tar')}, "
        f"{counted(summary.num_views, 'view')}, target sets: "
        f"{', '.join(summary.targets) or 'none'}",
        f"bytes        {human_bytes(summary.bytes)}, {human_bytes(summary.bytes_per_sample)} per sample "
        f"(the cache: {human_bytes(summary.cache_bytes)})",
    ]
    lines += [f"codes        {name}: {human_bytes(size)} per sample" for name, size in summary.codes.items()]
    lines += [
        f"this run     {counted(summary.units_made, 'tar')}",
        f"next         tec-cache train {shell_words(['--cache', summary.pack])} --out RUN",
    ]
    return block(lines)


def unpack_text(summary: UnpackSummary) -> str:
    """Say what was unpacked."""
    lines = [
        f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
        f"holds        {counted(summary.num_views, 'view')}, target sets: {', '.join(summary.targets) or 'none'}; "
        f"{counted(summary.units, 'unit')}, {summary.units_made:,} of them made by this run",
    ]
    if summary.rewritten:
        lines.append(
            f"rewritten    {counted(summary.rewritten, 'file')} with the same values in other bytes than the "
            "original's: another release wrote those"
        )
    return block(lines)


def merge_text(summary: MergeSummary) -> str:
    """Say what was joined."""
    lines = [
        f"cache        {summary.out}  ({summary.fingerprint[:12]})",
        f"copied       {counted(summary.views_copied, 'unit')} of views, {summary.targets_copied:,} of targets, "
        f"{human_bytes(summary.bytes)}",
        f"kept         {counted(summary.already_there, 'unit')} that the cache had already",
    ]
    if summary.different:
        lines.append(
            f"different    {counted(len(summary.different), 'unit')} that the cache had in another form, and keeps:"
        )
        lines += [f"  {name}" for name in summary.different[:10]]
        if len(summary.different) > 10:
            lines.append("  ... all of them with --json")
    return block([*lines, f"next         tec-cache info {shell_words([summary.out])}"])


def rm_text(summary: RemoveSummary, dry_run: bool) -> str:
    """Say what was removed."""
    left = ", ".join(f"{name} ({counted(units, 'unit')})" for name, units in summary.left_targets.items()) or "none"
    lines = [
        f"{'to remove' if dry_run else 'removed':<13}{summary.removed}: {counted(summary.units, 'unit')}, "
        f"{human_bytes(summary.bytes)}",
        f"left         {counted(summary.left_views, 'view')} in {counted(summary.left_units, 'unit')}; "
        f"target sets: {left}",
    ]
    if summary.left_alone:
        lines.append(f"not ours     {listed(summary.left_alone)}: left where they are")
    if dry_run:
        lines.append("dry run: nothing was removed")
    return block(lines)


def fit_text(summary: Summary, go_on: str) -> str:
    """Say how a codec was fitted; go_on: the command that extracts with it."""
    lines = [
        f"cache        {summary.cache}  ({summary.fingerprint[:12]})",
        *_quality_lines(summary),
        *_kept_text(summary.foreign, "cache"),
        f"next         {go_on}",
    ]
    return block(lines)
