"""The code in the documents runs, and their numbers agree with the result files."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import re
import shlex
import statistics
import warnings
from pathlib import Path

import optax
import pytest

import gum_optax
from experiments import demo
from experiments.results import contenders, one_seed, readme
from experiments.trainer import cli

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments" / "README.md",
    *SITE,
]


def name_of(page):
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)

# Code ------------------------------------------------------------------------------------------

# A fence, its language, and its text up to the closing fence.
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Pages whose code compiles next to nothing. The others take seconds each and are left to the slow.
QUICK = {"README.md", "docs/choosing.md", "docs/quantized.md", "docs/quickstart.md"}


def fences(page, *languages):
    """The text of every fence in one of the languages, in order."""
    found = FENCE.findall(page.read_text())
    return [text for language, text in found if language in languages]


def run(page):
    """Runs the code of a page, block after block in one namespace; returns it and what it printed.

    Pages about other programs show code for their environments: it is skipped where they are not.
    """
    names, printed = {"__name__": name_of(page)}, []
    for source in fences(page, "python"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                exec(compile(source, name_of(page), "exec"), names)
            except ModuleNotFoundError as missing:
                pytest.skip(f"{missing.name} is not installed")
        printed.append(out.getvalue())
    return names, printed


CODE = [page for page in [ROOT / "README.md", *SITE] if fences(page, "python")]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[] if name_of(page) in QUICK else pytest.mark.slow)
        for page in CODE
        if page != DOCS / "quickstart.md"
    ],
    ids=name_of,
)
def test_code_runs(page):
    run(page)


def test_the_quickstart_shows_what_is_printed():
    page = DOCS / "quickstart.md"
    names, printed = run(page)
    plans = [text for text in printed if text.startswith("group")]
    # Losses depend on versions and machines; plans are counted.
    shown = fences(page, "text")
    assert len(plans) == 2
    assert set(plans) < set(shown)
    # A statement, and the error or warning below it, which may be broken into lines.
    for session in fences(page, "pycon"):
        for line in session.strip().split(">>> ")[1:]:
            statement, _, expected = line.partition("\n")
            assert said_by(statement, names) == " ".join(expected.split())


def said_by(statement, names):
    """The error or the warnings of a statement, in one line."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            exec(statement, names)
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return " ".join(f"{w.category.__name__}: {' '.join(str(w.message).split())}" for w in told)


def test_pages_have_code():
    assert len(CODE) >= 7


# Tables and numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "table"),
    [(page, table) for page, tables in readme.TABLES.items() for table in tables],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_tables_are_those_of_the_result_files(page, table):
    text = (ROOT / page).read_text()
    assert f"{table()}\n" in text, "renew it by `python -m experiments.results.readme`"


def test_a_data_mesh_sends_nothing():
    rows = json.loads((ROOT / "experiments/results/sharding.json").read_text())["rows"]
    assert not any(row["collectives"] for row in rows if row["mesh"] == "data=8")


def test_the_memory_of_the_first_pages_is_that_of_the_result_file():
    rows = json.loads((ROOT / "experiments/results/tpu.json").read_text())["rows"]
    place = ("Llama-3-8B", "v5p")
    of = {row["step"]: row for row in rows if (row["model"], row["kind"]) == place}
    steps = ("AdamW", "8-bit Muon, lean", "lean GUM, projected", "lean low-rank Muon, projected")
    adamw, muon, lean, undrawn = (of[step]["peak_bytes"] / 2**30 for step in steps)
    weights = of["AdamW"]["parameter_bytes"] / 2**30
    index = " ".join((DOCS / "index.md").read_text().split())
    assert (
        f"takes {adamw:.1f} GiB with AdamW, {muon:.1f} GiB with 8-bit Muon and a factored second "
        f"moment for the rest, {lean:.1f} GiB with the leanest setup of GUM, and "
        f"{undrawn:.1f} GiB without its drawn layers; {weights:.1f} GiB are the weights"
    ) in index
    memory = " ".join((DOCS / "little_memory.md").read_text().split())
    assert f"Of Llama-3-8B's {lean:.1f} GiB, {weights:.1f} are weights" in memory
    # A refresh takes less than a step.
    assert of["lean GUM, refresh"]["peak_bytes"] < of["lean GUM, projected"]["peak_bytes"]
    parts = {
        (row["step"], row["batch"]): row["peak_bytes"] / 2**30
        for row in rows
        if (row["model"], row["kind"]) == ("LLaMA-1B", "v5p")
    }
    more = [
        parts[step, "4 parts of 4 x 1024"] - parts[step, "4 x 1024"]
        for step in ("AdamW", "GUM, projected")
    ]
    assert (
        f"takes {more[0]:.1f} GiB more and GUM's with compressed gradients {more[1]:.1f}" in memory
    )
    plain = of["AdamW"]["peak_bytes"] / 2**30
    assert f"AdamW in bfloat16 takes {plain:.1f} GiB" in _quantized()


def _quantized():
    return " ".join((DOCS / "quantized.md").read_text().split())


def test_the_losses_of_states_in_few_bits_are_those_of_the_study():
    entries = json.loads((ROOT / "experiments/results/studies/frontier_fallbacks.json").read_text())

    def losses(**options):
        usual = {"fallback_learning_rate": 0.01, "b2": 0.95, "weights": "float32"}
        options = usual | {"momentum": "float32"} | options
        found = {}
        for entry in entries:
            config = {"momentum": "float32"} | entry["config"]
            if all(config[name] == value for name, value in options.items()):
                found[config["seed"]] = entry["validation_loss"]
        return [found[seed] for seed in sorted(found)]

    first = [
        losses(optimizer="muon", fallback=fallback, seed=0)[0]
        for fallback in ("adamw", "adamw_float8", "adamw8", "adamw8_rows")
    ]
    told = "ended at {:.3f} in float32, {:.3f} with `float8`, {:.3f} with `int8` in blocks of 256, "
    assert (told + "and {:.3f} with `int8` in rows").format(*first) in _quantized()
    exact, coded = (losses(optimizer="muon", fallback=f) for f in ("adamw", "adamw_float8"))
    assert len(exact) == len(coded) == 3
    told = "over 3 seeds {:.3f} in float32 and {:.3f} with `float8`"
    assert told.format(sum(exact) / 3, sum(coded) / 3) in _quantized()
    slow = [
        losses(optimizer="muon", fallback=fallback, seed=0, b2=0.999)[0]
        for fallback in ("adamw", "adamw_float8_at_random", "adamw_float8")
    ]
    told = "ended at {:.3f} in float32, {:.3f} with `float8` rounded at random, and {:.3f} rounded "
    assert (told + "to nearest").format(*slow) in _quantized()
    scale = losses(optimizer="muon", fallback="columns")
    assert f"SCALE's rule ended at {sum(scale) / 3:.3f} (3 seeds, 1e-2)" in _quantized()
    beside = {"fallback": "factored", "fallback_learning_rate": 0.02}
    sampled = {"optimizer": "gum", "residual": "sampled", **beside}
    gum, gum8 = (losses(momentum=each, **sampled) for each in ("float32", "int8"))
    assert len(gum) == len(gum8) == 3
    below = (sum(gum) - sum(gum8)) / 3
    assert f"GUM ended {below:.3f} below GUM in float32 (4,000 steps, 3 seeds" in _quantized()
    muons, muons6 = (
        losses(optimizer="muon", momentum=each, **beside) for each in ("float32", "int6")
    )
    assert len(muons) == len(muons6) == 3
    muon = muons[0]
    half, byte = (
        losses(optimizer="muon", weights=each, seed=0, **beside)[0] for each in ("bfloat16", "int8")
    )
    assert f"ended at {half:.3f} with such weights, and at {muon:.3f} with float32" in _quantized()
    assert f"rounded in the same way, ended at {byte:.3f}" in _quantized()
    lean = one_seed.found("lean_muon6")
    muon = one_seed.found("muon").loss
    assert f"ended at {lean.loss:.3f}, Muon beside AdamW at {muon:.3f} (one seed" in _quantized()
    choosing = " ".join((DOCS / "choosing.md").read_text().split())
    told = "it ended at {:.3f} in the mean, float32 at {:.3f} ([result]"
    assert told.format(sum(muons6) / 3, sum(muons) / 3) in choosing


def test_the_losses_of_longer_fine_tuning_are_those_of_the_study():
    entries = json.loads((ROOT / "experiments/results/studies/finetuning_long.json").read_text())
    loss = {entry["config"]["optimizer"]: entry["loss"]["mean"] for entry in entries}
    text = " ".join((DOCS / "finetuning.md").read_text().split())
    told = "8-bit Muon has a loss of {muon:.3f} with 318 MiB of state, AdamW {adamw:.3f} and GUM "
    assert (told + "{gum:.3f}").format(**loss) in text


def test_the_losses_of_methods_in_the_guide_are_those_of_the_studies():
    choosing = " ".join((DOCS / "choosing.md").read_text().split())
    above = {
        key: [sum(of[key].above) / 3 for of in contenders.points().values()]
        for key in ("polar_4_int8", "columns_rotate", "swan", "scale", "adamw", "muon_rows4")
    }
    polar, columns, swan = (above[key] for key in ("polar_4_int8", "columns_rotate", "swan"))
    assert "at 0.4 bytes, it is {:.2f} and {:.2f} above Muon, below".format(*polar) in choosing
    assert all(p < four for p, four in zip(polar, above["muon_rows4"], strict=True))
    rows = json.loads((ROOT / "experiments/results/tpu.json").read_text())["rows"]
    peaks = {
        row["step"]: row["peak_bytes"] / 2**30
        for row in rows
        if (row["model"], row["kind"]) == ("Llama-3-8B", "v5p")
    }
    assert f"takes {peaks['compact, lean, layer by layer']:.1f} GiB" in choosing
    assert f"where 8-bit Muon takes {peaks['8-bit Muon, lean']:.1f}." in choosing
    told = "The column-normalized residual is {:.2f} and {:.2f} above."
    assert told.format(*columns) in choosing
    assert f"on the speeches it ended {swan[1]:.2f} above Muon, ahead of AdamW" in choosing
    assert f"on the library {swan[0]:.2f} above it, like SCALE" in choosing
    assert swan[1] < above["adamw"][1] and abs(swan[0] - above["scale"][0]) < 0.01
    rates = {key: point.rate for key, point in contenders.points()["stdlib"].items()}
    assert rates["swan"] == 4 * rates["muon"]
    assert f"{one_seed.found('mud').above:.2f} above Muon on the speeches" in choosing
    times = json.loads((ROOT / "experiments/results/benchmarks/variants/60m.json").read_text())
    mud, muon = (times["ratios"][f"{name}, 8 bits"]["of_medians"] for name in ("MUD", "Muon"))
    assert 0.4 < mud / muon < 0.6  # "half of the time of an update"
    full, low = (times["ratios"][n]["of_medians"] for n in ("Muon", "orthogonalized residual"))
    assert 1.15 < low / full < 1.25  # "a fifth longer than full-rank Muon's"


def test_half_of_the_width_is_level_with_muon():
    """Of the standard library on CPUs; of the speeches, where Muon's seeds 1 and 2 ran on a GPU."""

    def losses(name, corpus, **options):
        entries = json.loads((ROOT / f"experiments/results/studies/{name}.json").read_text())
        wanted = {"corpus": [corpus], "steps": 4000, "learning_rate": 3e-3, **options}
        found = [e for e in entries if {k: e["config"].get(k) for k in wanted} == wanted]
        return {entry["config"]["seed"]: entry["validation_loss"] for entry in found}

    rank = {"rank": 64, "residual": "polar"}
    muon = {"optimizer": "muon", "momentum": "float32", "fallback_learning_rate": 1e-2}
    muon_on_cpus = muon | {"fallback": "adamw", "b2": 0.95}
    gaps = []
    for name, corpus in (("frontier_fallbacks", "stdlib"), ("frontier_speeches", "runs/sotu")):
        reference = losses(name, corpus, **muon_on_cpus)
        if corpus == "runs/sotu":
            reference = losses("frontier", corpus, **muon) | {0: reference[0]}
        ours = losses(name, corpus, **rank)
        assert ours.keys() == reference.keys() == {0, 1, 2}
        gaps.append([ours[seed] - reference[seed] for seed in range(3)])
    results = " ".join((DOCS / "results.md").read_text().split())
    library, speeches = map(statistics.mean, gaps)
    told = (
        f"ends {-library:.3f} below Muon on the library and {speeches:.3f} above it on the speeches"
    )
    assert told in results
    told = "standard deviations of {:.3f} and {:.3f} between three seeds"
    assert told.format(*map(statistics.stdev, gaps)) in results


def test_the_losses_in_the_text_are_those_of_the_study():
    first, second = contenders.points().values()
    above = {
        key: [sum(of[key].above) / len(of[key].above) for of in (first, second)] for key in first
    }
    results = " ".join((DOCS / "results.md").read_text().split())
    assert "ends {:.2f} and {:.2f} above it".format(*above["columns_rotate"]) in results
    assert "and {:.2f} and {:.2f} above Muon".format(*above["gum"]) in results
    told = "ends {:.2f} above Muon on the library and {:.2f} on the speeches, below Muon in 4 bits"
    assert told.format(*above["polar_4_int8"]) in results
    bytes_of = {key: point.bytes for key, point in first.items()}
    fewer = {key for key in first if bytes_of[key] <= bytes_of["polar_4_int8"]} - {"polar_4_int8"}
    for corpus in (0, 1):
        assert min(above[key][corpus] for key in fewer) > above["polar_4_int8"][corpus]
    drawn = (above["galore_muon"], above["gum_4"])
    told = "falls from {:.2f} to {:.2f} and from {:.2f} to {:.2f}"
    assert told.format(*(each[i] for i in (0, 1) for each in drawn)) in results
    longer = [
        above[f"{key}_20"][i] - above[key.replace("galore", "galore_muon")][i]
        for key in ("gum", "galore") for i in (0, 1)
    ]  # fmt: skip
    assert f"lose {min(longer):.2f} to {max(longer):.2f}." in results
    lead = [g - m for g, m in zip(above["galore_muon"], above["gum"], strict=True)]
    assert all(round(each, 2) in (0.04, 0.05) for each in lead)
    for of in (first, second):
        pairs = zip(of["gum"].above, of["galore_muon"].above, strict=True)
        assert all(gum < biased for gum, biased in pairs)


def test_the_demo_uses_the_best_learning_rates_of_the_grid():
    for optimizer, rate in demo.LEARNING_RATES.items():
        assert readme.best_of_grid()[optimizer]["learning_rate"] == rate


# Links and names ---------------------------------------------------------------------------------

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$|^\((\w+)\)=$", re.MULTILINE)


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them, and its own labels."""
    found = set()
    for heading, label in HEADING.findall(page.read_text()):
        plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("`", ""))
        found.add(label or plain.strip().replace(" ", "-"))
    return found


@each_page
def test_links_lead_to_files_and_headings(page):
    missing = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            missing.append(target)
    # Figures of the site are named in directives.
    for figure in re.findall(r"^```\{figure\} (\S+)$", page.read_text(), re.MULTILINE):
        if not (page.parent / figure).exists():
            missing.append(figure)
    assert not missing


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    public = [name for name in vars(gum_optax) if not name.startswith("_")]
    missing = [name for name in public if not re.search(rf"(:: |gum_optax\.){name}\b", text)]
    assert not missing, "give them a place in docs/api"


@pytest.mark.parametrize(
    ("heading", "function"),
    [
        ("`optax.adamw`", optax.adamw),
        ("`optax.contrib.muon`", optax.contrib.muon),
        ("`optax.contrib.galore`", optax.contrib.galore),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_parameter_of_another_optimizer_has_its_row(heading, function):
    text = (DOCS / "moving.md").read_text()
    [section] = re.findall(rf"^## From {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    firsts = re.findall(r"^\| (.*?) \|", section, re.M)
    named = set(re.findall(r"`(\w+)`", " ".join(firsts)))
    assert set(inspect.signature(function).parameters) <= named


def test_the_readme_is_a_first_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140


# Commands ----------------------------------------------------------------------------------------

# Commands in the text stand between backquotes, others on lines of their own.
COMMAND = re.compile(
    r"`python -m (experiments[^`]*)`|^    python -m (experiments.*)$", re.MULTILINE
)
COMMANDS = sorted(
    {
        " ".join((quoted or alone).split("#")[0].split())
        for page in PAGES
        for quoted, alone in COMMAND.findall(re.sub(r"\\\n\s*", "", page.read_text()))
    }
)


class Understood(Exception):
    """A command line was read without an error."""


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documents_are_understood(command, monkeypatch):
    name, *arguments = shlex.split(command)
    found = importlib.util.find_spec(f"{name}.__main__" if name.endswith("benchmarks") else name)
    assert found, name
    main = getattr(importlib.import_module(found.name), "main", None)
    if (
        main is None
        or "--help" in arguments
        or name.endswith(
            ("readme", "overview", "flax_nnx", "flax_linen", "checkpoints", "particles")
        )
    ):
        return
    parse = cli.parse

    def stop(*parts):
        parse(*parts)
        raise Understood

    monkeypatch.setattr(cli, "parse", stop)
    with pytest.raises(Understood):
        main(arguments)


def test_documents_have_commands():
    assert len(COMMANDS) > 40
