"""What others published on benchmarks where looking matters, as data, each table with the conditions of its figures.

Read in papers, model cards and READMEs on 2026-11-25. Figures of one table were measured alike, as far as its source
says; those of two tables were not. Knows no files and computes nothing.
"""

from __future__ import annotations

from visrl.evaluate.published import PublishedTable

_TREEVGR = "TreeVGR's paper"
_TREEVGR_LIMIT = "16,384 · 28² px for TreeVGR, others not said"
_TREEBENCH_READING = "the text between the answer tags is the letter"
_MINI_O3 = "Mini-o3's README"
_MINI_O3_READING = "mean of 32 attempts at temperature 1 for Mini-o3 and what it ran again, others as reported"
_MINI_O3_LIMIT = "2 million px for Mini-o3, others not said"
_HR_COLUMNS = ("all", "single", "cross")
_LITE_COLUMNS = (
    "all", "perception: OCR", "RS", "DT", "MO", "AD", "reasoning: OCR", "DT", "MO", "AD",
)  # fmt: skip

PUBLISHED_TABLES: tuple[PublishedTable, ...] = (
    PublishedTable(
        "vstar", f"{_TREEVGR}, table 3", ("all", "attributes", "relation"),
        {
            "o3-0416": (95.7, None, None),
            "TreeVGR-7B": (91.1, 94.0, 87.0),
            "DeepEyes-7B": (90.0, 92.1, 86.8),
            "Qwen2.5-VL-72B": (84.8, 90.8, 80.9),
            "Pixel-Reasoner-7B": (80.6, 83.5, 76.3),
            "InternVL3-78B": (76.4, 75.7, 77.6),
            "Qwen2.5-VL-7B": (74.3, 77.4, 69.7),
            "LLaVA-OneVision-72B": (73.8, 80.9, 63.2),
            "InternVL3-8B": (72.3, 73.0, 71.1),
            "LLaVA-OneVision-7B": (70.7, 73.0, 60.5),
            "GPT-4o-1120": (66.0, None, None),
        },
        reading="measured by the authors, all rows alike", limit=_TREEVGR_LIMIT,
    ),
    PublishedTable(
        "vstar", f"{_TREEVGR}, table 8", ("all",), {"Qwen2.5-VL-7B": (71.2,)},
        reading="the base model of its ablation", limit=_TREEVGR_LIMIT,
    ),
    PublishedTable(
        "vstar", "DeepEyes, pull request 66", ("first of two", "second"), {"DeepEyes-7B": (89.0, 91.6)},
        reading="options unshuffled: the right one always first", judge="Qwen2.5-72B",
        limit="16,384 · 28² px",
    ),
    PublishedTable(
        "vstar", "DeepEyes, pull request 66", ("first of two", "second"), {"DeepEyes-7B": (84.3, 85.9)},
        reading="options shuffled", judge="Qwen2.5-72B", limit="16,384 · 28² px",
    ),
    PublishedTable(
        "vstar", _MINI_O3, ("all",),
        {
            "Mini-o3": (88.2,), "Chain-of-Focus": (88.0,), "Pixel-Reasoner": (86.3,), "DeepEyes": (83.3,),
            "DyFo": (81.2,), "Qwen2.5-VL-7B": (75.5,), "SEAL": (75.4,), "LLaVA-OneVision": (70.9,), "GPT-4o": (65.2,),
        },
        reading=_MINI_O3_READING, limit=_MINI_O3_LIMIT, is_ranked=False,
    ),
    PublishedTable(
        "vstar", "Pixel-Reasoner's README", ("all",), {"Pixel-Reasoner": (84.0,)},
        reading="the answer in \\boxed{}", limit="8,000 · 28² px",
    ),
    *(
        PublishedTable(
            f"hrbench{size}", f"{_TREEVGR}, table 3", _HR_COLUMNS, scores,
            reading="measured by the authors, all rows alike", limit=_TREEVGR_LIMIT,
        )
        for size, scores in (
            ("4k", {
                "Qwen2.5-VL-72B": (79.4, 88.8, 70.0),
                "TreeVGR-7B": (77.1, 90.3, 64.0),
                "InternVL3-78B": (75.5, 84.5, 66.5),
                "DeepEyes-7B": (75.1, 91.3, 59.0),
                "Pixel-Reasoner-7B": (72.9, 86.0, 60.3),
                "Qwen2.5-VL-7B": (72.1, 88.8, 55.5),
                "InternVL3-8B": (70.8, 79.3, 62.3),
                "LLaVA-OneVision-72B": (66.3, 76.5, 56.0),
                "LLaVA-OneVision-7B": (64.3, 74.8, 53.8),
            }),
            ("8k", {
                "Qwen2.5-VL-72B": (76.3, 84.3, 68.3),
                "TreeVGR-7B": (73.1, 86.5, 59.8),
                "DeepEyes-7B": (72.6, 86.8, 58.5),
                "Qwen2.5-VL-7B": (68.8, 83.5, 54.0),
                "InternVL3-78B": (67.3, 71.8, 62.8),
                "Pixel-Reasoner-7B": (66.9, 80.0, 54.3),
                "InternVL3-8B": (62.0, 64.3, 59.8),
                "LLaVA-OneVision-72B": (60.9, 68.8, 53.0),
                "LLaVA-OneVision-7B": (59.8, 65.3, 54.3),
            }),
        )
    ),
    *(
        PublishedTable(
            f"hrbench{size}", _MINI_O3, ("all",), scores,
            reading=_MINI_O3_READING, limit=_MINI_O3_LIMIT, is_ranked=False,
        )
        for size, scores in (
            ("4k", {
                "Mini-o3": (77.5,), "Pixel-Reasoner": (74.0,), "DeepEyes": (73.2,), "Qwen2.5-VL-7B": (68.2,),
                "GPT-4o": (62.0,),
            }),
            ("8k", {
                "Mini-o3": (73.3,), "DeepEyes": (69.5,), "Pixel-Reasoner": (66.9,), "Qwen2.5-VL-7B": (62.7,),
                "GPT-4o": (58.3,),
            }),
        )
    ),
    *(
        PublishedTable(
            f"hrbench{size}", "HR-Bench's README", ("all",), scores,
            reading="mean over four rotations of the options", judge="a language model of the authors' choice",
        )
        for size, scores in (
            ("4k", {
                "Qwen3-VL-32B": (84.6,), "Qwen3-VL-30B-A3B": (82.5,), "human": (82.0,), "InternVL2-76B": (71.0,),
                "GPT-4o-0513": (68.0,), "Qwen2-VL-7B": (66.8,),
            }),
            ("8k", {
                "human": (86.8,), "Qwen3-VL-32B": (81.6,), "Qwen3-VL-30B-A3B": (79.3,), "Qwen2-VL-7B": (66.5,),
                "GPT-4o-0513": (63.9,), "InternVL2-76B": (61.4,),
            }),
        )
    ),
    PublishedTable(
        "mme-realworld", _MINI_O3, ("all",),
        {
            "Mini-o3": (65.5,), "Pixel-Reasoner": (64.4,), "DeepEyes": (64.0,), "LLaVA-OneVision": (57.4,),
            "Qwen2.5-VL-7B": (57.3,), "GPT-4o": (45.2,),
        },
        reading=_MINI_O3_READING, limit=_MINI_O3_LIMIT, is_ranked=False,
    ),
    PublishedTable(
        "mme-realworld-lite", f"{_TREEVGR}, table 4", _LITE_COLUMNS,
        {
            "TreeVGR-7B": (54.9,), "DeepEyes-7B": (53.2,), "InternVL3-78B": (52.3,), "Pixel-Reasoner-7B": (49.7,),
            "LLaVA-OneVision-72B": (48.7,), "InternVL3-8B": (47.9,), "LLaVA-OneVision-7B": (43.7,),
            "Qwen2.5-VL-72B": (43.7,),
            "Qwen2.5-VL-7B": (42.3, 87.6, 32.7, 83.0, 27.3, 30.0, 72.0, 62.0, 28.7, 23.0),
        },
        reading="measured by the authors, all rows alike", limit=_TREEVGR_LIMIT,
    ),
    PublishedTable(
        "treebench", f"{_TREEVGR}, table 2", ("accuracy", "mIoU"),
        {
            "o3-0416": (54.8, None), "Gemini-2.5-Pro-0605": (54.1, None), "TreeVGR-7B": (50.4, 44.0),
            "GPT-4o-1120": (46.9, None), "InternVL3-78B": (46.4, None), "Gemini-2.5-Flash-0520": (45.9, None),
            "Qwen2.5-VL-72B": (42.2, None), "LLaVA-OneVision-72B": (40.5, None), "Pixel-Reasoner-7B": (39.0, 35.7),
            "InternVL3-8B": (38.8, None), "DeepEyes-7B": (37.5, 30.0), "LLaVA-OneVision-7B": (37.3, None),
            "Qwen2.5-VL-7B": (37.0, None),
        },
        reading=_TREEBENCH_READING, judge="none", limit=_TREEVGR_LIMIT,
    ),
    PublishedTable(
        "treebench", "TreeVGR's README, run again", ("accuracy", "mIoU"), {"TreeVGR-7B": (49.38, 43.3)},
        reading=_TREEBENCH_READING, judge="none", limit="16,384 · 28² px",
    ),
    PublishedTable(
        "treebench", _TREEVGR, ("accuracy",),
        {
            "Gemini-2.5-Pro": (61.0,), "o3": (58.3,), "Gemini-2.5-Flash": (51.9,),
            "GPT-4o": (49.4,), "Qwen2.5-VL-7B": (43.7,), "InternVL3-8B": (43.5,),
        },
        reading="the true boxes written in the prompt", judge="none",
    ),
    PublishedTable(
        "treebench", _TREEVGR, ("accuracy",),
        {
            "o3": (33.8,), "Gemini-2.5-Pro": (33.1,), "Qwen2.5-VL-7B": (31.8,),
            "Gemini-2.5-Flash": (29.9,), "InternVL3-8B": (29.6,), "GPT-4o": (29.1,),
        },
        reading="what is asked about masked in the picture", judge="none",
    ),
    PublishedTable(
        "zoombench", "ZoomBench's data card", ("all",), {"Qwen2.5-VL-7B": (42.5,)},
        reading="exact, else the judge", judge="Qwen3-30B-A3B-Instruct-2507", limit="16,777,216 px",
    ),
    PublishedTable(
        "visualprobe", _MINI_O3, ("hard", "medium", "easy"),
        {
            "Mini-o3": (48.0, 50.4, 67.0), "DeepEyes": (35.1, 29.8, 60.1), "Pixel-Reasoner": (28.8, 29.6, 58.4),
            "Qwen2.5-VL-7B": (23.9, 26.0, 39.1), "LLaVA-OneVision": (13.4, 12.5, 36.2), "GPT-4o": (11.2, 15.4, 47.5),
        },
        reading=_MINI_O3_READING, judge="GPT-4o-2024-11-20", limit=_MINI_O3_LIMIT, is_ranked=False,
    ),
    PublishedTable(
        "infovqa", "Pixel-Reasoner's README", ("all",), {"Pixel-Reasoner": (84.0,)},
        reading="the answer in \\boxed{}, no ANLS", limit="8,000 · 28² px",
    ),
    PublishedTable(
        "chartqa", f"{_TREEVGR}, table 7", ("all",), {"TreeVGR-7B": (85.8,), "Qwen2.5-VL-7B": (85.6,)},
        limit=_TREEVGR_LIMIT,
    ),
)  # fmt: skip
