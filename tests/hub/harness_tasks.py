"""Small tasks for lm-evaluation-harness, as YAML and JSON files."""

import json

PICKED = [{"q": f"def f{i}(x):\n    return x * ", "answers": [f"{i}", f"{i + 1}  # naïve", " None", "x * x\n"],
           "gold": i % 4} for i in range(12)]
WRITTEN = [{"q": f"def f{i}", "a": "(x):"} for i in range(5)]
READ = [{"text": f"def f{i}(x):\n    return x * {i}  # naïve {'x' * (40 * i)}\n"} for i in range(4)]

PICK = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: answers
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITE = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs:
  until: ["\\n", "}}"]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
"""
READING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


def write_task(folder, name, docs, fields):
    """The path of a task's YAML file over a JSON file beside it."""
    data = folder / f"{name}.json"
    data.write_text("\n".join(map(json.dumps, docs)), encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
                    f"test_split: test\n{fields}", encoding="utf-8")
    return str(path)


def write_tasks(folder):
    """Three tasks of different types."""
    return [write_task(folder, *task) for task in (("pick", PICKED, PICK), ("write", WRITTEN, WRITE),
                                                   ("read", READ, READING))]
