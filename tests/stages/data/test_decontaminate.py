"""Recall on paraphrases made here (two sets: the threshold was chosen with the first, the second was written after it), precision
on pairs that share their numbers and on public sets. PHIMINI_DATA_SAMPLES names a folder with gsm8k_train.jsonl, gsm8k_test.jsonl,
math500.jsonl, aqua_rat.jsonl and olympiadbench.jsonl as their publishers have them; without it those tests are skipped."""

import json
import os
import random
import re
import time
from collections import defaultdict
from pathlib import Path

import pytest

from phimini.stages.data.arithmetic_problems import Problem, generate_problems
from phimini.stages.data.decontaminate import (
    Questions,
    fingerprint,
    same_question,
)

CHOSEN_WITH = [
    ("A bakery sells 48 muffins in the morning and 36 in the afternoon. How many muffins are sold that day?", "In the morning a bakery sells 48 muffins; another 36 are sold in the afternoon. What is the day's total of muffins sold?"),
    ("Lena earns $15 an hour. She works 6 hours on Monday and 4 hours on Friday. How much does she earn?", "On Monday Karim works 6 hours and on Friday 4 hours. His wage is $15 per hour. How much money did he earn?"),
    ("A train travels 180 miles in 3 hours. At the same speed, how far does it go in 5 hours?", "How many miles will a train cover in 5 hours if it keeps travelling at the speed at which it went 180 miles in 3 hours?"),
    ("A tank holds 1,200 litres and leaks 15 litres each hour. After how many hours is it empty?", "After how many hours will a tank of 1200 litres be empty when 15 litres leak from it every hour?"),
    ("Solve the inequality $\\ln(x^2+1) \\ge 5$ with a calculator.", "With a calculator, solve $\\ln(x^2+1)\\geq 5$"),
    ("Find the smallest positive integer $n$ such that $n^2 + 3n + 5$ is divisible by 121.", "What is the least positive integer n for which n^2+3n+5 is divisible by $121$?"),
    ("Compute $\\frac{3}{4} + \\frac{5}{6}$.", "What is \\dfrac{3}{4}+\\dfrac{5}{6}?"),
    ("Let $f(x) = 2x^2 - 7x + 3$. Find the sum of the roots of $f$.", "Find the sum of all roots of the function f(x)=2x^2-7x+3."),
    ("What is 3 + 4?", "Add 4 and 3."),
    ("What is 3 + 4?", "State the final answer to the following arithmetic problem: 3 + 4 ="),
    ("Compute 47 * 6.", "Multiply 6 by 47."),
    ("What is $47 \\times 6$?", "What is 47 times 6?"),
    ("What is the remainder of 517 divided by 8?", "Find 517 mod 8."),
    ("What is gcd(100, 200)?", "Find the gcd of 200 and 100."),
    ("Ann has 12 books, buys 4 boxes of 9 and gives away 7. How many books are left?", "Bob has 12 coins, buys 4 boxes of 9 and gives away 7. How many coins are left?"),
    ("Solve 7x + 12 = 61.", "Find x if 7x + 12 = 61."),
    ("What comes next: 4, 9, 14, 19?", "Find the next number: 4, 9, 14, 19."),
    ("A rectangle has length 12 cm and width 5 cm. What is the length of its diagonal?", "Find the diagonal of a rectangle whose sides are 12 cm and 5 cm long."),
    ("There are three cats and five dogs in a shelter. Each cat eats 2 cans a day and each dog eats 4 cans. How many cans are eaten in a week?", "A shelter houses 3 cats and 5 dogs. Every dog eats 4 cans per day, and every cat 2. How many cans do they eat in a week?"),
    ("Prove that the product of any two odd integers is odd.", "Show that the product of two odd integers is always odd."),
    ("How many subsets of $\\{1, 2, 3, 4, 5, 6\\}$ contain no two consecutive numbers?", "Find the number of subsets of {1,2,3,4,5,6} that contain no two consecutive integers."),
    ("A shirt costs $40. It is discounted by 25%. What is the sale price?", "What is the sale price of a shirt that costs 40 dollars after a discount of 25\\%?"),
    ("A bag holds 4 red, 5 blue and 6 green marbles. Two are drawn without replacement. What is the probability that both are blue?", "Two marbles are drawn, without replacement, from a bag with 5 blue, 6 green and 4 red marbles. Find the probability that both of them are blue."),
    ("In triangle $ABC$, $AB = 13$, $BC = 14$ and $CA = 15$. Find its area.", "Triangle ABC has sides AB=13, BC=14, CA=15. What is the area of the triangle?"),
]  # fmt: skip
WRITTEN_AFTER = [
    ("Mia reads 12 pages on Monday and twice as many on Tuesday. How many pages does she read on both days together?", "On Monday Omar read 12 pages, on Tuesday twice as many. What is the total number of pages he read?"),
    ("A farmer has 35 hens. Each hen lays 5 eggs a week. How many dozen eggs does he collect in 3 weeks?", "Each of a farmer's 35 hens lays 5 eggs per week. How many dozens of eggs are collected by him in three weeks?"),
    ("The sum of two numbers is 84 and their difference is 12. Find the larger number.", "Two numbers differ by 12 and add up to 84. What is the larger one?"),
    ("A car uses 8 litres of fuel for 100 km. How much fuel does it need for 350 km?", "How many litres of fuel are needed for 350 km by a car that uses 8 litres per 100 km?"),
    ("Evaluate $\\int_0^1 (3x^2 + 2x)\\,dx$.", "Calculate the integral \\[\\int_{0}^{1}(3x^{2}+2x)dx.\\]"),
    ("Find the number of positive divisors of 360.", "How many positive divisors does $360$ have?"),
    ("If $\\log_2 (x+3) = 5$, what is $x$?", "Solve for x: \\log_{2}(x + 3)=5"),
    ("Factor $x^2 - 9x + 14$.", "Write $x^{2}-9x+14$ in factored form."),
    ("Sam has $2,500 in a bank that pays 4% interest a year. How much interest does he get after 3 years?", "A bank pays 4\\% interest per year. Sam has \\$2500 there. What interest does he get after 3 years?"),
    ("Pipe A fills a pool in 6 hours and pipe B in 9 hours. How long do both take together?", "How long does it take both pipes to fill a pool together if pipe A takes 6 hours and pipe B 9 hours?"),
    ("What is the area of a circle with radius 7?", "A circle has radius 7. Find its area."),
    ("Find the value of 81 - 25 + 13.", "Compute 81-25+13"),
    ("Ein Zug fährt 240 km in 3 Stunden. Wie schnell fährt er?", "Wie schnell fährt ein Zug, der in 3 Stunden 240 km fährt?"),
    ("How many ways are there to arrange the letters of the word BANANA?", "In how many ways can the letters of BANANA be arranged?"),
]  # fmt: skip
OTHERS = [
    ("Solve the inequality $\\ln(x^2+1) \\ge 5$ with a calculator.", "Multiply $(1+5i)(2+i)$."),
    ("A mother is twice as old as her son, who is 5. How old is she?", "If one person paints half a house in 5 days, how many hours do five people need for a whole one?"),
    ("Find a power series for $\\int \\ln(1-x)\\,dx$.", "Evaluate $\\int e^t/\\sqrt{e^t+1}\\,dt$."),
    ("What is 3 + 4?", "What is 3 * 4?"),
    ("What is 3 + 4?", "Let $f(x) = x + 3$. Find $f(4)$."),
    ("Compute 47 * 6.", "Compute 47 * 16."),
    ("Compute 60 + 12.", "How many times does 12 fit in 60?"),
    ("Simplify x + y", "Simplify x - y"),
    ("Solve 7x + 12 = 61.", "Ann has 12 books and buys 7 boxes of 61. How many books now?"),
    ("A bakery sells 48 muffins in the morning and 36 in the afternoon. How many muffins are sold that day?", "Find the greatest common divisor of 48 and 36."),
    ("A rectangle has length 12 cm and width 5 cm. What is the length of its diagonal?", "A rectangle has length 12 cm and width 7 cm. What is the length of its diagonal?"),
    ("Peter has 20 books. He has read 40% of them and his brother 10%. How many more has Peter read?", "Roy saved 40% more than his brother, who saved $10 more than their sister. She saved $20. How much did Roy save?"),
    ("Let $a, b, c, d$ be positive real numbers with $(a+c)(b+d)=ac+bd$. Find the smallest value of $\\frac{a}{b}+\\frac{b}{c}+\\frac{c}{d}+\\frac{d}{a}$.", "Let $a,$ $b,$ and $c$ be positive real numbers. Find all values of $\\frac{c}{a}+\\frac{a}{b+c}+\\frac{b}{c}$."),
    ("Find all functions $f$ with $f(x+f(y))=f(x+y)+f(y)$ for all positive real $x, y$; and $f(1)=1$", "Let $x, y, z$ be positive real numbers with $xyz(x+y+z)=1$. Find the least value of $(x+y)(y+z)=1$."),
    ("The parabola $y=x^{2}-2x+4$ is translated $p$ units to the right and $q$ units down, so that its $x$-intercepts are 3 and 5. Find $p$ and $q$.", "If $f(x)=5x^2+3x+4$, what is the value of $f(-2)$?"),
    ("Jenny is 5 years older than Charlie, and Charlie is 3 years older than Bobby. How old is Charlie when Jenny is twice as old as Bobby?", "Jerry is twice as old as he was 5 years ago. How old will Jerry be in 3 years?"),
    ("Is every even number above two a sum of two primes?", "Is there a largest prime number?"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "other"), CHOSEN_WITH + WRITTEN_AFTER)
def test_a_paraphrase_is_the_same_question(question: str, other: str) -> None:
    assert same_question(fingerprint(question), fingerprint(other))
    assert other in Questions([question])
    assert question in Questions([other])


@pytest.mark.parametrize(("question", "other"), OTHERS)
def test_the_same_numbers_or_the_same_words_alone_are_not(question: str, other: str) -> None:
    assert other not in Questions([question])
    assert question not in Questions([other])


@pytest.mark.parametrize(
    ("question", "other", "same"),
    [
        ("Tom has 1,000 books.", "Tom has 1000 books", True),
        ("Halve 1{,}250,000", "halve 1250000.0!", True),
        ("Add 007 and 0.50", "0.5 + 7", True),
        ("Who is he?", "who is he ?", True),
        ("What is gcd(100,200)?", "gcd of 200 and 100", True),
        ("Double \\frac12", "double $\\dfrac{1}{2}$", True),
        ("Double ½ and x²", "double 1/2 and x^2", True),
        ("Tom has 1,000 books.", "Tom has 1 book and 000", False),
        ("Double 0.5", "Double 0.05", False),
        ("Double 1.5", "Double 15", False),
        ("Add 1 and 2", "Add 12", False),
    ],
)
def test_a_number_written_otherwise_is_the_same_number(
    question: str, other: str, same: bool
) -> None:
    assert same_question(fingerprint(question), fingerprint(other)) == same


def test_the_demos_problems_are_told_apart_by_their_numbers() -> None:
    """Wordings of a template count as one question exactly if their numbers are the same."""
    problems = generate_problems(3, 3000, balanced=True)
    others = [p for seed in range(4, 9) for p in generate_problems(seed, 3000)]
    by_key: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_key[problem.key].append(problem)
    index = Questions(p.question for p in problems)
    operation = lambda p: [step.op for step in p.plan]
    reworded = 0
    for other in others:
        found = [problems[i] for i in index.matches(other.question)]
        assert all(p.key == other.key for p in found), (other, found)
        for twin in by_key[other.key]:
            if twin.family == other.family and operation(twin) == operation(other) and twin.answer == other.answer:  # fmt: skip
                assert twin in found, (twin.question, other.question)
                reworded += twin.question != other.question
    assert reworded > 300, "the draws hold such pairs"


def test_the_time_grows_with_the_rows_not_with_their_square() -> None:
    """A row is compared only with held-out questions of its numbers: 10 times the index takes under 3 times as long."""
    rng = random.Random(0)
    words = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(600)]
    draw = lambda: " ".join(rng.choices(words, k=20)) + f" {rng.randint(1, 999)} {rng.randint(1, 999)}?"  # fmt: skip
    rows = [draw() for _ in range(1000)]

    def seconds(size: int) -> float:
        index = Questions(draw() for _ in range(size))
        began = time.process_time()
        assert not any(row in index for row in rows)
        return time.process_time() - began

    assert min(seconds(8_000) for _ in range(2)) < 3 * min(seconds(800) for _ in range(2))


SAMPLES = os.environ.get("PHIMINI_DATA_SAMPLES")
needs_samples = pytest.mark.skipif(
    SAMPLES is None, reason="PHIMINI_DATA_SAMPLES names no folder of public sets"
)
SETS = ("gsm8k_train", "gsm8k_test", "math500", "aqua_rat", "olympiadbench")


def public(name: str) -> list[str]:
    lines = (Path(SAMPLES or "") / f"{name}.jsonl").read_text().splitlines()
    return list(dict.fromkeys(row.get("question") or row["problem"] for row in map(json.loads, lines)))  # fmt: skip


@needs_samples
def test_sets_that_share_no_question_lose_none() -> None:
    """Two sets without a common question lose no row; pairs with an overlap from 0.43 were read by hand."""
    sets = {name: public(name) for name in SETS}
    for held in SETS[1:]:
        index = Questions(sets[held])
        for name in SETS:
            if name != held:
                lost = [question for question in sets[name] if question in index]
                assert len(lost) <= 0.001 * len(sets[name]), (held, name, lost[:3])
    readings = lambda question: fingerprint(question).readings
    numbers = {reading for question in sets["gsm8k_test"] for reading in readings(question)}
    alone = sum(not numbers.isdisjoint(readings(question)) for question in sets["gsm8k_train"])
    assert alone > 700, "numbers alone would drop a tenth"


@needs_samples
def test_few_questions_of_one_set_are_taken_for_each_other() -> None:
    """GSM8K's 7,473 training questions have 9 such pairs: 2 are one question with other names, 1 is one story with
    another question, 6 are different riddles of ages or shares."""
    seen, groups = Questions(), []
    for question in (texts := public("gsm8k_train")):
        groups += [{texts[earlier], question} for earlier in seen.matches(question)]
        seen.add(question)
    assert 2 <= len(groups) <= 12, groups
    gift = " received $50 as a gift. She plans to buy two cassette tapes that cost $9 each and a headphone set that costs $25. How much money will she have left?"
    assert {"Josie" + gift, "Amanda" + gift} in groups


NAMES = re.compile(
    r"(?<=[a-z,] )[A-Z][a-z]{2,}\b|^[A-Z][a-z]{2,}(?= (?:has|is|was|buys|had|went)\b)"
)
SYNONYMS = {"buys": "purchases", "bought": "purchased", "costs": "is priced at", "gets": "receives", "total": "sum", "kids": "children",
            "left": "remaining", "money": "cash", "each": "every", "altogether": "in all", "store": "shop", "makes": "earns"}  # fmt: skip


def reworded(question: str, rng: random.Random) -> str:
    """Change names, words, spacing and the order of sentences before the last, and add an instruction."""
    for name in set(NAMES.findall(question)):
        question = re.sub(rf"\b{name}\b", rng.choice(["Yusuf", "Ingrid", "Chen", "Amara"]), question)  # fmt: skip
    for word, other in SYNONYMS.items():
        question = re.sub(rf"\b{word}\b", other, question)
    *told, asked = re.split(r"(?<=[.!?])\s+", question)
    rng.shuffle(told)
    return "  ".join(["Please solve this problem.", *told, asked, "Give the final answer."])


def respelled(question: str) -> str:
    """Rewrite LaTeX in another author's style."""
    for pattern, other in ((r"\\frac\b", r"\\dfrac"), (r"\\(?:le|leq)\b", r"\\leqslant"), (r"\\geq?\b", ">="), (r"\\cdot\b", r"\\times"),
                           (r"\$", ""), (r"\\left|\\right|\\,", ""), (r" ?([+=]) ?", r"  \1 "), (r"\^(\w)", r"^{\1}")):  # fmt: skip
        question = re.sub(pattern, other, question)
    return question.upper() if "\\" not in question else question


@needs_samples
@pytest.mark.parametrize("name", SETS[1:])
def test_planted_paraphrases_are_found(name: str) -> None:
    questions, rng = public(name), random.Random(0)
    index = Questions(questions)
    for change in (lambda q: reworded(q, rng), respelled):
        found = sum(i in index.matches(change(question)) for i, question in enumerate(questions))
        assert found >= 0.99 * len(questions), (name, change, found, len(questions))
