"""Knowledge-based visual question answering: seven benchmarks from their published files, and how answers are scored.

InfoSeek, OVEN, OK-VQA, A-OKVQA, ViQuAE, MRAG-Bench and CVQA, those of CoMEM (arXiv 2505.17670). Every answer is scored
twice: `strict` is what the benchmark's own script gives, `comem_compat` what CoMEM's released code gives, false matches
included. The two are never compared with one another.
"""
