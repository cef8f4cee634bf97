from muonlab.data.wikitext import MIN_ARTICLE, article, articles, paragraphs

SENTENCE = "The river rises in the northern hills and flows south through three counties to the sea. "
LONG = SENTENCE * 6


def page(title: str, text: str) -> str:
    return f'  <page>\n    <title>{title}</title>\n      <text xml:space="preserve">{text}</text>\n  </page>\n'


def test_links_keep_the_words_a_reader_sees():
    line = "The [[River Tees|Tees]] and the [[Humber]] meet the [http://example.org North Sea], said the ''old'' '''map''' of 1850."
    assert paragraphs(line) == ["The Tees and the Humber meet the North Sea, said the old map of 1850."]


def test_titles_with_a_colon_are_links_and_not_namespaces():
    line = "She appeared in [[Star Trek: The Next Generation]] and later on in [[fr:Paris]]many other series for television."
    assert paragraphs(line) == [
        "She appeared in Star Trek: The Next Generation and later on in many other series for television."
    ]


def test_nested_templates_and_tables_and_images_go():
    markup = (
        "{{Infobox|name={{lang|la|flumen}}|width=\n300}}\n"
        "{| class=x\n| A cell of a table that is long enough to be a paragraph and even ends in a stop.\n{|\n| inner\n|}\n|}\n"
        "[[Image:Tees.jpg|thumb|The [[River Tees|Tees]] at [[Yarm]].]] " + SENTENCE
    )
    assert paragraphs(markup) == [SENTENCE.strip()]


def test_lists_headings_references_comments_and_mathematics_go():
    markup = (
        f"== {SENTENCE}==\n* {SENTENCE}\n# {SENTENCE}\n: {SENTENCE}\n {SENTENCE}\n"
        f"{SENTENCE}<ref>Smith, ''Rivers''.</ref><!-- a\ncomment --> Its length is <math>x^2</math> long.<br />"
    )
    assert paragraphs(markup) == [f"{SENTENCE}Its length is long."]


def test_entities_are_characters_even_when_written_twice():
    line = "It runs 1850&ndash;1900 in S&atilde;o Paulo, &quot;the old town&quot;, and is free of charge for everybody."
    assert paragraphs(line) == ['It runs 1850–1900 in São Paulo, "the old town", and is free of charge for everybody.']


def test_what_a_dropped_template_leaves_in_parentheses_goes():
    line = "The river ({{IPA|ti:z}}) and its brook ({{IPA|x}}, also called the Beck) flow slowly to the cold North Sea."
    assert paragraphs(line) == ["The river and its brook (also called the Beck) flow slowly to the cold North Sea."]


def test_paragraphs_that_are_short_or_end_without_punctuation_go():
    assert paragraphs("It is a river.\n" + "a line without an end " * 10) == []


def test_the_census_bot_is_not_prose():
    bot = "As of the [[census]] of 2000, there are 1,234 people, 567 households, and 321 families residing in the town."
    assert paragraphs(f"{bot}\n{SENTENCE}") == [SENTENCE.strip()]


def test_no_markup_survives():
    assert paragraphs(f"{SENTENCE} A {{{{broken template and [[a broken link| are here.\n{SENTENCE}") == [
        SENTENCE.strip()
    ]


def test_redirects_other_namespaces_and_small_articles_are_no_documents():
    assert len(article(page("Tees", LONG))) >= MIN_ARTICLE
    assert article(page("Tees", "#REDIRECT [[River Tees]] " + LONG)) == ""
    assert article(page("Wikipedia:Tees", LONG)) == ""
    assert article(page("List of rivers", LONG)) == ""
    assert article(page("Tees", SENTENCE)) == ""


def test_a_dump_gives_its_articles_in_order_and_ignores_the_page_that_is_cut_off():
    dump = "<mediawiki>\n" + page("One", LONG + "One.") + page("Two", LONG + "Two.") + page("Three", LONG)[:300]
    found = list(articles(dump.encode().splitlines(keepends=True)))
    assert [text.rsplit(" ", 1)[1] for text in found] == ["One.", "Two."]
