"""The documents say what the code does: names, shapes, quoted blocks, tests and commands that they mention exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from rltoken import config
from rltoken.pipeline import SLOTS
from rltoken.train import checked
from rltoken.types import LIVE, PUBLISHED, SAMPLED, SCORED

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = ROOT / "docs/architecture.md"
README = ROOT / "README.md"
PAGES = {path.stem: path for path in sorted((ROOT / "docs/methods").glob("*.md"))}
METHODS = PAGES.pop("README")
MODULES = {path.stem: path for path in sorted((ROOT / "rltoken/methods").glob("*.py")) if path.stem != "__init__"}
REWARDS = ROOT / "docs/rewards.md"
EVALUATION = ROOT / "docs/evaluation.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
COST, PACKING = ROOT / "docs/cost.md", ROOT / "docs/packing.md"
SUPERVISED, MEASURED = ROOT / "docs/supervised.md", ROOT / "docs/measured.md"
FAULTS, SECURITY = ROOT / "docs/faults.md", ROOT / "docs/security.md"
SCALING, RESUME, DETERMINISM = (ROOT / f"docs/{name}.md" for name in ("scaling", "resume", "determinism"))
DOCUMENTS = [ARCHITECTURE, CONTRIBUTING, REWARDS, EVALUATION, COST, PACKING, SUPERVISED, MEASURED, FAULTS, SECURITY]
DOCUMENTS += [SCALING, RESUME, DETERMINISM, METHODS, *PAGES.values()]
LAUNCH = ".venv/bin/python -m rltoken.train "
COMMAND = re.compile(r"(?:(?:\.venv/bin/)?python|torchrun [^#]*|accelerate launch [^#]*) -m rltoken\.train (.*)")


def table(document, heading):
    """The rows of the first table whose header begins with `heading`, each a list of cells."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def signals_of_the_code():
    """Name -> (shape, when) of every signal: what stands before the colon of its description, and its list."""
    found = {}
    for when, names in (("sampled", SAMPLED), ("scored", SCORED), ("published", PUBLISHED), ("live", LIVE)):
        found |= {name: (text.partition(":")[0], when) for name, text in names.items()}
    for slot, names in SLOTS.items():
        found |= {name: (re.split(r"[ :]", text)[0], slot) for name, text in names.items() if name not in found}
    return found


def test_the_table_of_signals_is_that_of_the_code():
    documented = {name.strip("`"): (shape, when) for name, shape, when, _ in table(ARCHITECTURE, "signal")}
    expected = signals_of_the_code()
    expected["rng"] = ("torch.Generator", "sampled")
    assert documented == expected


def test_the_table_of_slots_is_that_of_the_code_in_order():
    rows = table(ARCHITECTURE, "slot")
    assert [row[0].strip("`") for row in rows] == list(SLOTS)
    for slot, group, *_ in rows:
        assert (ROOT / "conf" / group.strip("`+=")).is_dir(), f"{slot}: there is no group {group}"
    named = {slot: set(re.findall(r"`(\w+)`", what.partition("→")[0])) for slot, _, what, *_ in rows}
    for slot in ("prompts", "controls", "rows"):
        assert named[f"`{slot}`"] == set(SLOTS[slot])


def test_the_picture_shows_every_slot():
    picture = (ROOT / "docs/flow.svg").read_text(encoding="utf-8")
    assert set(re.findall(r'class="name"[^>]*>(\w+)<', picture)) == set(SLOTS)


def test_every_method_has_a_page_that_can_be_found_a_test_file_and_a_row():
    listed = set(re.findall(r"\]\((\w+)\.md[)#]", METHODS.read_text(encoding="utf-8")))
    rows = re.findall(r"\(docs/methods/(\w+)\.md\)", " ".join(row[0] for row in table(README, "what")))
    assert PAGES.keys() == MODULES.keys() == listed == set(rows)
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests/methods").glob("test_*.py")}
    assert tested >= MODULES.keys(), MODULES.keys() - tested


@pytest.mark.parametrize("name", MODULES)
def test_a_page_has_its_parts_its_configurations_and_its_papers(name):
    page = PAGES[name].read_text(encoding="utf-8")
    assert re.match(rf"# {name}\b", page)
    for part in ("Paper", "Changes", "Config", "Deviations", "Tests"):
        assert re.search(rf"^(\*\*{part}:\*\*|## {part}\b)", page, re.MULTILINE), f"{name}: no {part}"
    assert f"\n{LAUNCH}" in page, f"{name}: no command that trains"
    own = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "conf").glob("*/*.yaml")
        if f"rltoken.methods.{name}." in path.read_text(encoding="utf-8")
    ]
    assert own and all(path in page for path in own), f"{name}: not every one of {own} is named"
    assert f"`tests/methods/test_{name}.py" in page
    for arxiv in re.findall(r"\b\d{4}\.\d{5}\b", page):
        assert arxiv in MODULES[name].read_text(encoding="utf-8"), f"{name}: {arxiv} is not in the module"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_tests_that_are_mentioned_exist(document):
    text = document.read_text(encoding="utf-8")
    mentioned = re.findall(r"`((?:rltoken|conf|tests|docs|scripts|rewards)/[\w./]+?)(?:::(\w+))?`", text)
    assert mentioned
    for path, test in mentioned:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"


def anchors(document):
    """What a link into the document can name, by GitHub's rule."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


LINKING = [README, CONTRIBUTING, *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("document", LINKING, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for link in re.findall(r"\]\(([^):]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def quoted_blocks():
    """(path, block) of every block in CONTRIBUTING.md that is not a command; its path ends the line above it."""
    text = CONTRIBUTING.read_text(encoding="utf-8")
    for block in re.finditer(r"^```(python|yaml|text)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        above = text[: block.start()].rstrip().rpartition("\n")[2]
        path = re.search(r"`([\w./]+)`\)?:$", above)
        yield path[1] if path else f"no file is named above: {above}", block[2]


def test_quoted_blocks_are_verbatim():
    blocks = list(quoted_blocks())
    assert len(blocks) >= 6
    for path, block in blocks:
        assert block in (ROOT / path).read_text(encoding="utf-8"), f"CONTRIBUTING.md quotes {path} wrongly:\n{block}"


def test_the_quoted_signature_in_architecture_is_verbatim():
    (block,) = re.findall(r"```python\n(.*?)```", ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)
    assert block in (ROOT / "rltoken/methods/forking_tokens.py").read_text(encoding="utf-8")


def commands():
    """The overrides of every command of the documents that trains; of a sweep, of each job with its first seed."""
    for document in DOCUMENTS:
        for line in document.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            if found := COMMAND.match(line):
                words = [word for word in shlex.split(found[1], comments=True) if word != "--multirun"]
                given = OverridesParser.create().parse_overrides(words)
                yield from itertools.product(*(choices(override) for override in given))


def choices(override):
    """What a sweep makes of one override."""
    if not override.is_sweep_override():
        return [override.input_line]
    values = [f"{override.input_line.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
    return values[:1] if override.key_or_group == "seed" else values


@pytest.mark.parametrize("overrides", list(commands()), ids=" ".join)
def test_commands_compose_and_pass_the_checks(overrides, tmp_path):
    config.register_schemas()
    # some are for GPUs: what they say is checked on any machine
    machine = [] if any(override.startswith("hardware=") for override in overrides) else ["hardware=cpu"]
    if any(override.startswith("hardware=slurm") for override in overrides):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'rltoken[slurm]'")
        machine = ["trainer.use_cpu=true", "trainer.bf16=false"]
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, *machine])
    config.check_keys(cfg)
    pipeline, _, _ = checked(cfg, tmp_path)
    assert pipeline.stages() or not any("method." in override for override in overrides)


def test_the_quote_of_the_first_run_has_its_numbers():
    """Those of the table and the sentence in the README."""
    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    quote = text.partition("The run in the README:\n\n")[2].partition("\n\n")[0].replace("\n>", "")
    told = README.read_text(encoding="utf-8")
    found = re.findall(r"0\.\d{3} \[[\d., ]+\]|[\d.]+ ± [\d.]+|\+0\.\d{3}", quote)
    assert len(found) == 7 and all(number in told for number in found), found


def test_no_document_names_a_place_of_one_machine():
    for document in DOCUMENTS:
        assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|opt|usr)/", document.read_text(encoding="utf-8"))
