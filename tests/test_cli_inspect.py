"""The groups of a model, as a tree and as a drawn graph."""

import stat

import networkx as nx
import pytest
import torch
from command_line import done, invoke

import fxprune
from fxprune.cli import drawing
from fxprune.cli.drawing import dot_of, draw, network
from fxprune.errors import FxpruneError

NET = ["mynets:build", "--input", "3,8,8"]


def test_tree_names_layers_readers_and_reasons(project):
    lines = [line.rstrip() for line in invoke("inspect", *NET).stdout.splitlines()]
    assert lines[1:] == [
        "Net: 24 units in 2 groups can be removed; 1 group whole",
        "├── stem  12 units, prunable",
        "│   ├── stem  12 of 12 channels",
        "│   └── read by body",
        "├── body  12 units, prunable",
        "│   ├── body  12 of 12 channels",
        "│   └── read by head",
        "└── head  3 units, whole: it is the model's output",
        "    └── head  3 of 3 channels",
    ]


def test_a_size_that_the_model_does_not_take(project):
    result = invoke("inspect", "mynets:build", "--input", "2,8,8")
    assert result.exit_code == 1
    assert result.stderr.endswith("forward takes it; --input sets the size of a sample, such as 3,224,224\n")


def test_json_has_the_groups_that_couple_finds(project):
    import mynets

    content = done("inspect", *NET, "--exclude", "body")
    graph = fxprune.capture(mynets.build(), torch.zeros(2, 3, 8, 8))
    groups = fxprune.couple(graph, exclude=("body",))
    assert [(g["name"], g["units"], g["frozen"], g["readers"]) for g in content["groups"]] == [
        (group.name, len(group), group.frozen, list(group.consumers)) for group in groups
    ]
    assert content["groups"][0]["sites"] == {"stem": {"width": 12, "channels": 12}}


def test_batches_from_data_and_from_several_inputs(project):
    (project / "two.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.table, self.dense, self.head = nn.Embedding(5, 4), nn.Linear(3, 4), nn.Linear(4, 2)\n"
        "    def forward(self, words, x):\n"
        "        return self.head((self.table(words).mean(1) + self.dense(x)).relu())\n"
    )
    content = done("inspect", "two:Two", "--input", "int:6", "--input", "3")
    assert set(content["groups"][0]["sites"]) == {"table", "dense"}
    assert done("inspect", "mynets:build", "--data", "mynets:loader")["groups"][0]["units"] == 12


def nets(project):
    import mynets

    graph = fxprune.capture(mynets.build(), torch.zeros(2, 3, 8, 8))
    return graph, fxprune.couple(graph)


def test_network_leads_from_layers_to_groups_to_readers(project):
    net = network(*nets(project))
    assert nx.shortest_path(net, "layer stem", "layer head") == [
        "layer stem", "group 0", "layer body", "group 1", "layer head"
    ]  # fmt: skip
    assert net.nodes["layer stem"]["text"] == "stem  12"
    assert net.nodes["group 2"]["text"] == "head: 3 units\nwhole: it is the model's output"
    assert net.nodes["group 2"]["colour"] == drawing.FROZEN


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_drawn_by_matplotlib(project, monkeypatch, suffix, start):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    result = invoke("inspect", *NET, "-o", f"groups{suffix}")
    assert result.exit_code == 0, result.output
    content = (project / f"groups{suffix}").read_bytes()
    assert content.startswith(start)
    assert suffix != ".svg" or b"<text" in content or b"<path" in content


def test_drawn_by_graphviz_where_it_is(project, monkeypatch):
    """A program that is called as dot is: it keeps what it reads, and writes that to the file that it is told."""
    folder = project / "bin"
    folder.mkdir()
    program = folder / "dot"
    program.write_text('#!/bin/sh\nprintf "%s " "$1" > args\ncat > "$3"\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    graph, groups = nets(project)
    draw(graph, groups, project / "groups.svg")
    text = (project / "groups.svg").read_text()
    assert text == dot_of(network(graph, groups))
    assert '"layer stem" -> "group 0" [style=solid];' in text
    assert '"group 0" -> "layer body" [style=dashed];' in text
    assert (project / "args").read_text() == "-Tsvg "
    program.write_text("#!/bin/sh\necho no fonts >&2; exit 3\n")
    with pytest.raises(FxpruneError, match="Graphviz's dot fails with code 3: no fonts"):
        draw(graph, groups, project / "other.svg")
    assert not (project / "other.svg").exists()


def test_drawing_says_what_is_missing(project, monkeypatch):
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    monkeypatch.setattr("fxprune.cli.extras.find_spec", lambda name: None)
    with pytest.raises(FxpruneError, match="Drawing without Graphviz's program dot needs matplotlib"):
        draw(*nets(project), project / "groups.svg")
    assert not (project / "groups.svg").exists()
