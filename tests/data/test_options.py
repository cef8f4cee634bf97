import pytest

from muonlab.data import DataOptions
from muonlab.errors import InputError


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"corpus": " "}, "corpus"),
        ({"tokenizer": ""}, "tokenizer"),
        ({"vocab_size": 256}, "257"),
        ({"max_documents": 2}, "max_documents"),
        ({"tokenizer_bytes": 0}, "tokenizer_bytes"),
        ({"tune_fraction": 0.0}, "tune_fraction"),
        ({"report_fraction": 1.0}, "report_fraction"),
        ({"tune_fraction": 0.5, "report_fraction": 0.5}, "sum"),
    ],
)
def test_a_bad_option_is_refused_in_one_line_that_names_it(wrong, named):
    with pytest.raises(InputError) as caught:
        DataOptions(**wrong)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocab_size_matters_to_the_trained_tokenizer_only():
    assert DataOptions(tokenizer="bytes", vocab_size=0).tokenizer == "bytes"


def test_a_misspelt_key_is_refused_by_pydantic():
    pydantic = pytest.importorskip("pydantic")
    with pytest.raises(pydantic.ValidationError, match="vocabsize"):
        pydantic.TypeAdapter(DataOptions).validate_python({"vocabsize": 300})
