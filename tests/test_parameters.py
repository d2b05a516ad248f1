"""Parameters from files and the command line that are no mappings of names: one sentence, with its place."""

import nbformat
import pytest

from causaldpo_lib import parameters, run
from causaldpo_lib.errors import StudyError


@pytest.fixture
def notebook(tmp_path):
    content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]})])
    nbformat.write(content, tmp_path / "a.ipynb")
    return tmp_path / "a.ipynb"


@pytest.mark.parametrize("text", ["5", "[]", "null", '"n"', "[[1, 2]]"])
def test_inline_parameters_are_one_object(notebook, text, capsys):
    with pytest.raises(StudyError, match="is no object: write one"):
        run.parameters_of(notebook, inline=text)
    assert run.main([str(notebook), "-y", text, "-o", str(notebook.with_name("out.ipynb"))]) == 1
    assert capsys.readouterr().err.startswith(f"error: -y {text!r} is no object")


def test_inline_parameters_are_json(notebook):
    with pytest.raises(StudyError, match="is not JSON: write one object"):
        run.parameters_of(notebook, inline="n: 5")
    assert run.parameters_of(notebook, inline='{"n": 5}') == {"n": 5}


@pytest.mark.parametrize("key", ["? [a, b]\n: 1\n", "{[a]: 1}\n", "? {a: 1}\n: 1\n", "c:\n  ? [a]\n  : 1\n"])
def test_a_key_that_is_no_name_is_named_by_its_line(tmp_path, key):
    file = tmp_path / "p.yaml"
    file.write_text(f"# first\n{key}")
    line = 3 if key.startswith("c") else 2
    with pytest.raises(StudyError, match=rf"p\.yaml, line {line}: not valid YAML \(a key is a list or a mapping"):
        parameters.read_yaml(file)


def test_a_value_of_the_command_line_with_a_list_as_a_key_is_text():
    assert parameters.from_text("{[1]: 2}", {}) == "{[1]: 2}"
