"""Evaluation: `visrl.evaluate(…)` is `visrl.evaluate.run.evaluate`.

run             `visrl eval`: from a config to scores
config          its keys
benchmarks      the table of benchmarks; one of your own is module:NAME
questions       reading questions; viscot reads Visual-CoT's and RefCOCO's
row_files       rows of JSON and parquet files, and those of TSV files (tsv), which the readers of other benchmarks
                share: vstar, hrbench, mme_realworld, treebench, zoombench (and VisualProbe), documents
readings        how a benchmark is worded and its replies read: published, the toolkits', ours; wordings has the words,
                choices the order of options
inference       asking a policy, resumable
judging         judging its answers
results         reading result files; their rows are rewards.results

rules           every published rule on replies, by its source; toolkit_rules are VLMEvalKit's and lmms-eval's,
                vqa_rules those over several reference answers
choice_figures  what rows of a benchmark with readings add up to over all its questions

compare         two checkpoints on the same questions: `visrl eval compare`
tables          scores as text
answers         scoring answer files of other programs, boxfiles their boxes, predictions reads both
toolkits        scoring prediction files of lmms-eval and VLMEvalKit, toolkit_files their rows, toolkit_export ours as
                theirs; spreadsheets are .xlsx
published       what others published of Visual-CoT and RefCOCO; published_zoom of the other benchmarks
leaderboard     our results among them, as a page
ask             `visrl ask`
"""

from visrl.callable_package import make_callable

make_callable(__name__, "run", "evaluate")
