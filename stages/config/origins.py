"""`phimini config RECIPE [key=value ...]`: every value of the resolved config, and where it comes from."""

from operator import attrgetter

from phimini.stages.config.dialect import paths, read_words, text_of
from phimini.stages.config.options import RunOptions, of_recipe, recipe_of
from phimini.stages.config.recipes import PAPER, RECIPES, phi4_mini_reasoning
from phimini.stages.config.schema import RunConfig


def config(verb: str, words: list[str]) -> int:
    """Print one `key=value` a line, as the command line takes it, with its origin."""
    read = read_words(words, RunOptions, verb, names=1)
    run = of_recipe(RunOptions, read).run
    ours = "ours" if read.names[0] in RECIPES else "recipe"
    for path, origin in origins(run, recipe_of(read), set(read.given), ours).items():
        print(f"{path + '=' + text_of(attrgetter(path)(run)):<58} {origin}")
    return 0


def origins(run: RunConfig, recipe: RunConfig, given: set[str], ours: str) -> dict[str, str]:
    """Return `override`, `paper` or `ours` for each field, with the value replaced and the paper's words.

    A value is the paper's if the paper gives this field and the value equals that of `phi4_mini_reasoning`.
    """
    paper, found = phi4_mini_reasoning(), {}
    for path, _ in paths(RunConfig):
        value = attrgetter(path)
        if path in given:
            found[path] = f"override of {text_of(value(recipe))}"
        elif path in PAPER and value(run) == value(paper):
            found[path] = f"paper: {PAPER[path]}"
        else:
            found[path] = ours
    return found
