"""Prompts that the router's methods are compared by: of no set that `benchmarks.router_report_data` reports.

They come from the same packages, so that what is chosen is chosen on prompts as strange as those reported: other
tasks of bigbench, other sets of OpenAI's evals, none of them a variant of a reported one. Nothing is trained on them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from benchmarks.router_data import spread
from benchmarks.router_report_data import read_source
from meswitch_cli.router.train.data import Example

#: At most so many prompts of each set.
EACH, NULL_EACH = 14, 8
DOMAINS: dict[str, tuple[str, ...]] = {
    "maths": (
        "ev:math-derivatives/questions", "ev:multi-step-equations/samples", "ev:probabilities-word-problems/samples",
        "ev:linear_equations/samples", "ev:aime_evaluation/samples", "ev:geometry_puzzle/samples",
        "ev:isosceles-right-triangle/samples", "ev:shopping_discount_comparison/samples", "ev:determinant/samples",
        "ev:number_pattern/samples", "ev:arithmetic-expression/samples", "ev:chinese-remainder-theorem/samples",
        "ev:count_intersections_polynomial/samples", "ev:recurrence-relation/samples", "bb:arithmetic",
        "bb:chinese_remainder_theorem",  "bb:modified_arithmetic",
    ),
    "code": (
        "ev:formal-grammar-to-regex/formal-grammar-to-regex", "ev:code_combination/samples", "ev:code_progress/samples",
        "ev:unified_patch/samples", "ev:crontab/samples", "ev:gpt-protocol-buffers/samples",
        "ev:singlestore-vectorsearch/samples", "ev:forth_stack_sim/detailed_samples", "ev:json_patch_object/samples",
        "ev:automata-and-complexity/samples", "bb:cs_algorithms", "bb:semantic_parsing_spider",

    ),
    "logic": (
        "ev:logic/samples", "ev:reasoning/samples",
        "ev:corr2cause/corr2cause",  "ev:logic-grid/logic-grid",
         "ev:track_objects/samples", "ev:abstract-causal-reasoning/text_samples",
        "bb:temporal_sequences", "bb:tracking_shuffled_objects", "bb:penguins_in_a_table",
        "bb:reasoning_about_colored_objects", "bb:sufficient_information", "bb:fantasy_reasoning",
    ),
}  # fmt: skip
NULL = (
    "bb:abstract_narrative_understanding", "bb:anachronisms", "bb:causal_judgment", "bb:conceptual_combinations",
    "bb:crash_blossom", "bb:crass_ai", "bb:cryptonite", "bb:dark_humor_detection", "bb:disambiguation_qa",
    "bb:discourse_marker_prediction", "bb:emojis_emotion_prediction", "bb:fact_checker",
    "bb:figure_of_speech_detection", "bb:goal_step_wikihow", "bb:gre_reading_comprehension", "bb:hhh_alignment",
    "bb:hindi_question_answering", "bb:hinglish_toxicity", "bb:hyperbaton", "bb:implicit_relations",
    "bb:irony_identification", "bb:kannada", "bb:moral_permissibility", "bb:movie_dialog_same_or_different",
    "bb:nonsense_words_grammar", "bb:novel_concepts", "bb:odd_one_out", "bb:persian_idioms",
    "bb:phrase_relatedness", "bb:physical_intuition", "bb:qa_wikidata", "bb:question_selection",
    "bb:real_or_fake_text", "bb:ruin_names", "bb:scientific_press_release", "bb:sentence_ambiguity",
    "bb:similarities_abstraction", "bb:social_support", "bb:strange_stories", "bb:strategyqa", "bb:tense",
    "bb:timedial", "bb:understanding_fables", "bb:vitaminc_fact_verification", "bb:which_wiki_edit", "bb:winowhy",
    "bb:word_unscrambling", "bb:bbq_lite_json", "bb:authorship_verification", "bb:auto_categorization",
    "bb:cause_and_effect",  "bb:rephrase", "bb:parsinlu_reading_comprehension",
    "bb:swedish_to_german_proverbs", "bb:gender_inclusive_sentences_german",
    "ev:soc_codes/samples", "ev:ambiguous-sentences/samples", "ev:allergen-information/samples",
    "ev:astro_eval/samples", "ev:hebrew_bible/samples", "ev:illinois-law/samples", "ev:human-safety/human-safety",
     "ev:polish-exams-qa/samples", "ev:rhetorical_devices/samples",
      "ev:invoices/match", "ev:coqa/samples",
    "ev:abstract2title/samples", "ev:heart-disease/samples", "ev:job_listing_title_for_a_caregiver_in_japan/samples",

)  # fmt: skip


def load_development(packages: Path, known: Collection[str]) -> list[Example]:
    """All of it but for the texts in `known`; null prompts have the domain None."""
    seen = set(known)
    found = []
    for domain, sets in (*DOMAINS.items(), (None, NULL)):
        for source in sets:
            for example in spread(list(read_source(packages, source, domain)), EACH if domain else NULL_EACH):
                if example.text not in seen:
                    seen.add(example.text)
                    found.append(example)
    return found
