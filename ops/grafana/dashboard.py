"""The operator dashboard as Grafana reads it: what story.py asks, written with Grafana's foundation SDK."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from mlops_course.blueprint import FEATURES, ORIGINS
from ops import ROOT
from ops.grafana.story import ROWS, Chart

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

TARGET = ROOT / "ops" / "grafana" / "dashboards" / "operator.json"
SUMMARY_URL = "/public/summary/index.html"  # docker-compose.yml puts build/summary where Grafana serves files
DATASOURCE = "${datasource}"

WINDOWS = ("1h", "1d", "7d")  # those of the rules
# A release that answers now and did not a minute ago.
_NAMES = "release, service_version, model_version"
RELEASE_MARK = f"count by ({_NAMES}) (release_info) unless count by ({_NAMES}) (release_info offset 1m)"


def lines(chart: Chart) -> Any:
    """Return a panel of lines or stacked areas over time."""
    from grafana_foundation_sdk.builders import common, timeseries
    from grafana_foundation_sdk.models import common as values
    from grafana_foundation_sdk.models.dashboard import DynamicConfigValue

    areas = chart.kind == "areas"
    panel = (
        timeseries.Panel()
        .axis_label(chart.axis)
        .fill_opacity(30 if areas else 0)
        .line_width(1)
        .show_points(values.VisibilityMode.AUTO)
        .stacking(common.StackingConfig().mode(values.StackingMode.NORMAL if areas else values.StackingMode.NONE))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(values.LegendDisplayMode.LIST)
            .placement(values.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(values.TooltipDisplayMode.MULTI).sort(values.SortOrder.DESCENDING))
    )
    if chart.steps:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(values.GraphThresholdsStyleMode.DASHED))
    for place, query in enumerate(chart.queries):
        if query.limit:
            dashes = {"fill": "dash", "dash": [10, 10]}
            panel.override_by_query(letter(place), [DynamicConfigValue("custom.lineStyle", dashes)])
    return panel


def value(chart: Chart) -> Any:
    """Return a panel with one large number for each series."""
    from grafana_foundation_sdk.builders import common, stat
    from grafana_foundation_sdk.models import common as values
    from grafana_foundation_sdk.models.dashboard import ValueMap, ValueMappingResult

    panel = (
        stat.Panel()
        .graph_mode(values.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .text_mode(values.BigValueTextMode.NAME if "{{" in chart.queries[0].name else values.BigValueTextMode.VALUE)
    )
    if chart.words:
        texts = {key: ValueMappingResult(text=text, color=color) for key, (text, color) in chart.words.items()}
        panel.mappings([ValueMap(options=texts)])
    return panel


def bars(_chart: Chart) -> Any:
    """Return a panel with one bar for each series, as they are now."""
    from grafana_foundation_sdk.builders import bargauge, common
    from grafana_foundation_sdk.models import common as values

    return (
        bargauge.Panel()
        .orientation(values.VizOrientation.HORIZONTAL)
        .display_mode(values.BarGaugeDisplayMode.BASIC)
        .show_unfilled(False)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def letter(place: int) -> str:
    """Return the name by which a panel knows its query: A, B, C."""
    return chr(ord("A") + place)


def panel(chart: Chart, number: int) -> Any:
    """Return the panel of a chart, as a builder of the SDK."""
    from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
    from grafana_foundation_sdk.builders.prometheus import Dataquery
    from grafana_foundation_sdk.models.common import DataSourceRef
    from grafana_foundation_sdk.models.dashboard import Threshold, ThresholdsMode

    made = {"lines": lines, "areas": lines, "value": value, "bars": bars}[chart.kind](chart)
    source = DataSourceRef(type_val="prometheus", uid=DATASOURCE)
    made.id(number).title(chart.title).description(chart.description).unit(chart.unit).no_value(chart.nothing)
    made.datasource(source).span(chart.width).height(chart.height)
    for place, query in enumerate(chart.queries):
        target = Dataquery().datasource(source).expr(query.expr).legend_format(query.name).ref_id(letter(place))
        made.with_target(target.range() if chart.kind in ("lines", "areas") else target.instant())
    steps = chart.steps or ((None, "transparent"),)
    made.thresholds(
        ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=least, color=color) for least, color in steps])
    )
    for limit, method in ((chart.low, made.min), (chart.high, made.max), (chart.decimals, made.decimals)):
        if limit is not None:
            method(limit)
    return made


def variables() -> list[Any]:
    """Return what can be chosen above the dashboard."""
    from grafana_foundation_sdk.builders.dashboard import CustomVariable, DatasourceVariable, QueryVariable
    from grafana_foundation_sdk.models.common import DataSourceRef
    from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh, VariableSort

    def chosen(text: str, value: str) -> VariableOption:
        return VariableOption(selected=True, text=text, value=value)

    everything = chosen("All", "$__all")
    return [
        DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
        QueryVariable("release")
        .label("release")
        .description("commit, version of the model, fingerprint of the settings")
        .datasource(DataSourceRef(type_val="prometheus", uid=DATASOURCE))
        .query({"query": "label_values(release_info, release)", "refId": "release"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_DESC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything),
        CustomVariable("origin")
        .label("origin")
        .description("for the scores; other panels show all origins together")
        .values(",".join(ORIGINS))
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything),
        CustomVariable("window")
        .label("drift window")
        .description("which flights are compared: those of the last …")
        .values(",".join(WINDOWS))
        .current(chosen("1d", "1d")),
        CustomVariable("baseline")
        .label("baseline")
        .description("with what they are compared")
        .values("training : 0,the window before : 1")
        .current(chosen("training", "0")),
        CustomVariable("feature")
        .label("feature")
        .description("for the panel that shows its values")
        .values(",".join(FEATURES))
        .current(chosen(FEATURES[-1], FEATURES[-1])),
        CustomVariable("compare")
        .label("compare traffic with")
        .description("how long ago")
        .values("1h,1d,7d")
        .current(chosen("7d", "7d")),
    ]


def marks() -> list[Any]:
    """Return the marks on all charts: when a release began to answer."""
    from grafana_foundation_sdk.builders.dashboard import AnnotationQuery
    from grafana_foundation_sdk.models.common import DataSourceRef

    return [
        AnnotationQuery()
        .name("Releases")
        .datasource(DataSourceRef(type_val="prometheus", uid=DATASOURCE))
        .enable(True)
        .icon_color("purple")
        .expr(RELEASE_MARK)
        .step("60s")
        .title_format("release {{release}}")
        .text_format("service {{service_version}}, model {{model_version}}")
    ]


def build() -> Dashboard:
    """Return the whole dashboard."""
    from grafana_foundation_sdk.builders.dashboard import Dashboard, DashboardLink, Row, TimePicker
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType

    made = (
        Dashboard("Flight disruption: operator")
        .uid("operator")
        .description(
            "From what users notice, at the top, down to what may explain it. docs/dashboards.md says how to read it."
        )
        .tags(["flight-disruption"])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .timepicker(TimePicker().refresh_intervals(["10s", "30s", "1m", "5m"]))
        .refresh("30s")
        .timezone("browser")
        .variables(variables())
        .annotations(marks())
        .link(
            DashboardLink("Summary for everybody")
            .type(DashboardLinkType.LINK)
            .url(SUMMARY_URL)
            .tooltip("Are we within our promises? Is the model stable? Made by `python -m ops summary`.")
            .target_blank(True)
        )
    )
    number = 0
    for title, charts in ROWS:
        number += 1
        made.with_row(Row(title).id(number))
        for chart in charts():
            number += 1
            made.with_panel(panel(chart, number))
    return made.build()


def render() -> str:
    """Return the dashboard as Grafana reads it."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    with warnings.catch_warnings():
        # The SDK would rather have the newer format; this is the one that Grafana has always read from files.
        warnings.filterwarnings("ignore", "Prefer using", DeprecationWarning)
        return JSONEncoder(sort_keys=True, indent=1).encode(build()) + "\n"
