"""Tasks made of Python's own library."""

import itertools

import pytest

from trainfw.data import DataConfig, open_source
from trainfw.data.stdlib import preferences, read_task, rewrites, summaries

SOURCE = '''
"""The module. It, too, has sentences."""

class Stack(list):
    """A stack of things.

    More on it (in detail). See `list` for x.y
    """

    @property
    def top(self):
        """The thing on top.  # really

        """  # a comment

        return self[-1]

    async def drop(self):
        """Throw away all that is on the stack, one
        after the other."""
        def inner():
            "Inner work is done here."
            pass
        self.clear()

    def documented_only(self):
        """Nothing but a docstring."""

    def passes(self):
        """Does not do anything."""
        pass

    def one_line(self): "Shares a line with code."; return 1
'''


def test_summaries():
    assert list(summaries(SOURCE)) == [
        (11, "@property\ndef top(self):\n    return self[-1]", "The thing on top.  # really"),
    ]
    # A class's source holds no docstring of its methods; this one has a method whose docstring cannot be cut out.
    whole = SOURCE.replace('"Shares a line with code."; ', "")
    [(_, source, first), _] = summaries(whole)
    assert first == "A stack of things."
    assert '"""' not in source
    assert "Inner work" not in source
    assert source.startswith("class Stack(list):\n    @property")


def test_preferences():
    """Each prompt with its own docstring rather than the next one's; none where these are the same."""
    define = 'def {0}():\n    """{1}"""\n    return {0}\n\n'
    told = [("a", "It is the first."), ("b", "It is the second."), ("c", "It is the second."), ("d", "It is the last.")]
    text = "".join(define.format(*one) for one in told)
    assert [(prompt.split("(")[0], *sides) for _, prompt, *sides in preferences(text)] == [
        ("def a", "It is the first.", "It is the second."),
        ("def c", "It is the second.", "It is the last."),
        ("def d", "It is the last.", "It is the first."),
    ]
    assert not list(preferences(define.format(*told[0])))
    assert list(summaries(SOURCE)) and not list(preferences(SOURCE)), "one alone"  # noqa: PT018


def test_preferences_of_the_library_are_honest():
    config = DataConfig(source="python-stdlib-preferences", format="preferences", sequence_length=8, max_characters=300)
    own = DataConfig(source="python-stdlib-summaries", format="prompt_completion", sequence_length=8)
    completions: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    for input_ in itertools.islice(open_source(own).inputs, 80):
        for _, row in input_.read(input_.path, ""):
            completions.setdefault(row["prompt"], set()).add(row["completion"])
            files.setdefault(input_.name, set()).add(row["completion"])
    rows = list(itertools.islice(open_source(config).rows(), 100))
    assert len({row.value["prompt"] for row in rows}) == 100
    for row in rows:
        assert len(row.value["prompt"]) <= 300
        file = row.id.rpartition(":")[0]
        assert row.value["chosen"] in completions[row.value["prompt"]]
        assert row.value["rejected"] in files[file] - {row.value["chosen"]}
        assert row.value["chosen"] not in row.value["prompt"]


def test_rewrites():
    pairs = [(prompt, completion) for _, prompt, completion in rewrites(SOURCE)]
    assert ("it too has sentences", "It, too, has sentences.") in pairs
    assert ("more on it in detail", "More on it (in detail).") in pairs
    assert ("throw away all that is on the stack one after the other",) in [(prompt,) for prompt, _ in pairs]
    assert not any("list" in prompt for prompt, _ in pairs), "markup is not prose"


def test_files_that_do_not_parse_have_no_pairs(tmp_path):
    (tmp_path / "a.py").write_bytes(b"def f(:\n")
    (tmp_path / "b.py").write_bytes(b"\xff")
    assert not list(read_task(tmp_path / "a.py", "python-stdlib-summaries"))
    assert not list(read_task(tmp_path / "b.py", "python-stdlib-rewrites"))


@pytest.mark.parametrize("task", ["python-stdlib-summaries", "python-stdlib-rewrites"])
def test_a_task_is_a_source(task):
    config = DataConfig(source=task, format="prompt_completion", sequence_length=8, max_characters=300)
    source = open_source(config)
    rows = list(itertools.islice(source.rows(), 300))
    assert len({row.value["prompt"] for row in rows}) == 300
    assert all(len(row.value["prompt"]) <= 300 and row.value["completion"].strip() for row in rows)
    assert rows[0].id.rpartition(".py:")[2].isdecimal()
    other = DataConfig(source=task, format="prompt_completion", sequence_length=8, max_characters=200)
    assert open_source(other).fingerprint() != source.fingerprint()


def test_topics_are_the_prose_of_the_reference():
    documents = [*open_source(DataConfig(source="python-stdlib-topics", sequence_length=8)).documents()]
    found = {document.id: document.text for document in documents}
    assert len(found) > 70
    assert found["topics:assert"].lstrip().startswith('The "assert" statement')
