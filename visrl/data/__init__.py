"""Data: rows of any format → samples and preferences, and back.

formats         the table of formats: how each is read and written; one of your own is module:NAME
sources         samples and preferences by one string: scenes, a named data set, a file, a data set of the hub
rows            rows one by one, good or bad: JSON lists and JSONL as streams

native          our own JSONL, and the short form of samples
viscot          Visual-CoT: training, benchmark, metadata and detection files
refcoco         RefCOCO, RefCOCO+ and RefCOCOg
sharegpt        LLaMA-Factory, ms-swift and LLaVA: dialogs reads who said what, grounding the boxes of ms-swift, info
                dataset_info.json; sharegpt_write writes
hf              parquet and `datasets`
sizes, embedded image sizes beside the rows; images inside them

convert, check  `visrl data convert` and `check`
stats           `visrl data stats`, and stats_page its page
"""
