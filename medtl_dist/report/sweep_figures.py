"""a sweep's summary and outcomes → its page's figures: which trials are marks, lines and axes, and what each caption says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from medtl_dist.report import charts, sweep_charts
from medtl_dist.report.figures import Figure, Table
from medtl_dist.report.svg import Told, circle
from medtl_dist.report.sweep_charts import Line, Mark, ring, sample, shape, shown
from medtl_dist.report.wording import count, decimals, duration, plural
from medtl_dist.sweep.outcome import Outcome

LR = "optim.lr"
MAX_AXES = 8  # of parallel coordinates: what still has room for its labels


def figures(content: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Figure]:
    """All figures for which there is something to draw."""
    return [*_rate(content), *_curves(content, outcomes), *_knobs_mattered(content), *_luck(content)]


def depth_name(depth: int, stages: int) -> str:
    """A frozen depth in words."""
    if depth == 0:
        return "nothing frozen"
    return "all but the head frozen" if stages and depth >= stages else f"{plural(depth, 'stage')} frozen"


def _roles(content: Mapping[str, Any]) -> dict[int, str]:
    roles = {content["best"]["trial"]: "best"} if content["best"] else {}
    return roles | ({content["winner"]["trial"]: "winner"} if content["winner"] else {})


def _role_legend(content: Mapping[str, Any]) -> list[tuple[Markup, str]]:
    winner, best = content["winner"], content["best"]
    if winner["trial"] == best["trial"]:
        return [(sample(ring(0, 0, "winner")), f"winner and plain best: trial {winner['trial']}")]
    return [
        (sample(ring(0, 0, "winner")), f"winner: trial {winner['trial']}"),
        (sample(ring(0, 0, "best")), f"plain best: trial {best['trial']}"),
    ]


def _rate(content: Mapping[str, Any]) -> Iterator[Figure]:
    rows = [(row, content["knobs"][str(row["trial"])].get(LR)) for row in content["ranking"]]
    known = [(row, rate) for row, rate in rows if isinstance(rate, int | float) and not isinstance(rate, bool)]
    if len({rate for _, rate in known}) < 2:
        return
    depths = sorted({(row["frozen_depth"], row["num_stages"]) for row, _ in known})
    roles = _roles(content)
    marks = [
        Mark(rate, row["auc"], _pair(row["auc_ci"]), depths.index((row["frozen_depth"], row["num_stages"])),
             roles.get(row["trial"], ""))
        for row, rate in known
    ]  # fmt: skip
    best = max(known, key=lambda each: each[0]["auc"])
    told = Told(
        "sweep-lr",
        "Validation AUC against learning rate, by frozen depth",
        f"{len(known)} trials at rates from {min(rate for _, rate in known):.3g} to {max(rate for _, rate in known):.3g}; "
        f"the highest AUC, {decimals(best[0]['auc'])}, is at {best[1]:.3g}.",
    )
    legend = [(sample(shape(0, 0, at, radius=8)), depth_name(*depth)) for at, depth in enumerate(depths)]
    yield Figure(
        "AUC against learning rate",
        sweep_charts.scatter_chart(told, marks, x_name="Learning rate (optim.lr)"),
        "Each mark is a trial at its best epoch; thin bars are 95% intervals over patients, where they are known. All trials "
        "are scored on the same patients, so two may differ for sure though their bars overlap.",
        legend=legend + _role_legend(content),
    )


def _pair(bounds: Any) -> tuple[float, float] | None:
    return (bounds[0], bounds[1]) if bounds else None


def _curves(content: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Iterator[Figure]:
    drawn = [one for one in outcomes if any(row.val_auc is not None for row in one.curve)]
    if not drawn:
        return
    roles = _roles(content)
    css = {"winner": "line-1", "best": "line-0"}
    lines = [
        Line([row.epoch + 1 for row in one.curve], [row.val_auc for row in one.curve], css.get(roles.get(one.number, ""), "line-other"))
        for one in drawn
    ]  # fmt: skip
    longest = max(len(one.curve) for one in drawn)
    told = Told(
        "sweep-curves", "Validation AUC by epoch, every trial", f"{len(drawn)} trials of up to {longest} epochs."
    )
    legend = []
    if content["winner"]:
        same = content["winner"]["trial"] == content["best"]["trial"]
        legend.append(
            (charts.swatch("line-1"), f"winner{' and plain best' if same else ''}: trial {content['winner']['trial']}")
        )
        if not same:
            legend.append((charts.swatch("line-0"), f"plain best: trial {content['best']['trial']}"))
    if len(drawn) > len(legend):
        legend.append((charts.swatch("line-other"), "the other trials"))
    yield Figure(
        "Learning curves",
        sweep_charts.curves_chart(told, lines),
        "Each line is a trial and ends in a dot, at its last epoch or where it was stopped or failed.",
        legend=legend,
    )


def _knobs_mattered(content: Mapping[str, Any]) -> Iterator[Figure]:
    found = content["importance"]
    if not found["knobs"]:
        return
    rows = [(one["knob"], one["value"], one["low"], one["high"]) for one in found["knobs"][:12]]
    above = [name for name, value, *_ in rows if found["chance"] is not None and value > found["chance"]]
    says = f"Beyond chance: {', '.join(above)}." if above else "No knob is beyond what chance alone gives."
    told = Told("sweep-importance", "Importance of each knob", says)
    values = [[name, decimals(value), f"{decimals(low)} to {decimals(high)}"] for name, value, low, high in rows]
    yield Figure(
        "Which knob mattered",
        sweep_charts.bars_chart(told, rows, found["chance"], x_name="Growth of the error, in variances of the AUC"),
        f"How much worse a forest predicts the AUC of trials it has not seen when a knob’s values are shuffled, from "
        f"{found['num_trials']} trials; thin lines: extremes over forests. The dashed line is what the best of as many knobs "
        f"without any influence reaches in 19 of 20 cases. {says} Trials that were stopped early count with what they had reached.",
        Table("Importance", ["Knob", "Importance", "Over forests"], values),
    )


def _luck(content: Mapping[str, Any]) -> Iterator[Figure]:
    luck = content["optimism"]
    if luck["value"] is None:
        return
    best, left = luck["best_auc"], luck["corrected"]
    says = f"Best AUC {decimals(best)}; on patients left out of the choice {decimals(left)}."
    interval = _pair(content["best"]["auc_ci"])
    legend = [
        (sample(circle(0, 0, 8, "dot")), f"best on validation, {decimals(best)}"),
        (sample(circle(0, 0, 8, "mark")), f"on patients left out of the choice, {decimals(left)}"),
    ]
    fewer = f" (the best {count(luck['considered'])} of them)" if luck["considered"] < luck["candidates"] else ""
    yield Figure(
        "How much of it is luck",
        sweep_charts.luck_chart(Told("sweep-luck", "Optimism of the best trial", says), best, left, interval),
        f"{count(luck['candidates'])} trials and epochs{fewer} were compared on the same patients, so the best is partly the "
        f"luckiest. Patients were redrawn {count(luck['replicates'])} times; the best on those drawn was scored on those left "
        f"out. The best loses {decimals(luck['value'])} (± {decimals(luck['error'])} from the number of draws), and was picked "
        f"again in {luck['stays_best'] * 100:.0f}% of the draws. The band is the plain best’s 95% interval, which leaves the "
        "choice out.",
        legend=legend,
    )


def parallel(content: Mapping[str, Any]) -> Figure | None:
    """Parallel coordinates of the ranked trials over the knobs that vary; None for fewer than two trials or no such knob."""
    rows = content["ranking"]
    knobs = [content["knobs"][str(row["trial"])] for row in rows]
    varying = [
        key
        for key in dict.fromkeys(key for row in knobs for key in row)
        if len({shown(row.get(key)) for row in knobs}) > 1
    ]
    if len(rows) < 2 or not varying:
        return None
    order = [one["knob"] for one in content["importance"]["knobs"]]
    varying.sort(key=lambda key: order.index(key) if key in order else len(order))
    axes = varying[: MAX_AXES - 1]
    styles = ["line-0" if place < max(1, len(rows) // 4) else "line-other" for place in range(len(rows))]
    if content["winner"]:
        styles[[row["trial"] for row in rows].index(content["winner"]["trial"])] = "line-1"
    columns = [[row.get(key) for row in knobs] for key in axes] + [[row["auc"] for row in rows]]
    told = Told("sweep-parallel", "Knobs and AUC of every trial", f"{len(rows)} trials over {', '.join(axes)} and AUC.")
    left_out = (
        f" Left out, as less important: {', '.join(varying[MAX_AXES - 1 :])}." if len(varying) >= MAX_AXES else ""
    )
    return Figure(
        "Every trial’s knobs",
        sweep_charts.parallel_chart(told, [*axes, "AUC"], columns, styles),
        f"A line is a trial; it crosses each axis at its value.{left_out}",
        legend=[
            (charts.swatch("line-1"), "winner"),
            (charts.swatch("line-0"), "the best quarter"),
            (charts.swatch("line-other"), "the others"),
        ],
    )


def stops_table(content: Mapping[str, Any]) -> Table:
    """Ends of the trials by frozen depth."""
    rows = [
        [depth_name(row["frozen_depth"], row["num_stages"]), count(row["trials"]), count(row["finished"]), count(row["stopped"]),
         count(row["failed"]), f"{row['mean_epochs']:.1f}", decimals(row["best_auc"])]
        for row in content["stops_by_depth"]
    ]  # fmt: skip
    head = ["Frozen depth", "Trials", "Finished", "Stopped early", "Failed", "Epochs, mean", "Best AUC"]
    return Table("Trials by frozen depth", head, rows)


def cache_table(content: Mapping[str, Any]) -> Table | None:
    """What the prefix cache took and, estimated, saved; None where no trial used it."""
    by_depth = content["cache"]["by_depth"]
    rows = [
        [depth_name(row["frozen_depth"], row["num_stages"]), count(row["trials"]), count(row["epochs"]), duration(row["spent_s"]),
         duration(row["saved_s"])]
        for row in by_depth
    ]  # fmt: skip
    head = ["Frozen depth", "Trials with it", "Epochs", "Spent on it", "Saved, estimated"]
    return Table("Shared outputs of the frozen stages", head, rows) if rows else None
