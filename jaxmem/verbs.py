"""What the command line can do: each verb with its flags and the function that it calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag of a verb: `kind` is "text", "texts" (may be given several times), "int", "float" or "bool"."""

    name: str
    kind: str
    default: Any
    help: str


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: `target` is "module:function"; `config` is "required", "optional" or "none".

    `argument` names the one positional word that the verb needs, if any.
    """

    target: str
    summary: str
    flags: tuple[Flag, ...] = ()
    config: str = "none"
    argument: str | None = None
    example: str = ""


_JSON = Flag("json", "bool", False, "print one JSON object and nothing else")
_ENCODER = Flag("encoder", "text", None, "a folder of the model that reads items for the CoMEM, where another answers")

VERBS: Mapping[str, Verb] = {
    "train": Verb(
        "jaxmem.training.run:main",
        "train a memory from examples or by rewards; running the same command again resumes",
        config="required",
        example="jaxmem train --config=configs/digits_quickstart.py",
    ),
    "generate": Verb(
        "jaxmem.sampling.cli:main",
        "answer a prompt about images, streaming to the terminal",
        (
            Flag(
                "model",
                "text",
                None,
                "a Hugging Face folder (default: the shipped tiny backbone)",
            ),
            Flag("memory", "text", None, "a folder with a trained memory; absent: the bare backbone"),
            _ENCODER,
            Flag("items", "text", None, "knowledge items for a CoMEM, a file as of jaxmem bank"),
            Flag("item", "texts", [], "the id of one of them, best first; repeat for several (default: all)"),
            Flag("prompt", "text", None, "the user's words; read from standard input when absent"),
            Flag("image", "texts", [], "an image file, before the prompt's words; repeat for several"),
            Flag("system", "text", None, "a system message"),
            Flag("max_new_tokens", "int", 256, "stop after so many tokens"),
            Flag("temperature", "float", 0.0, "0 takes the most likely token"),
            Flag("top_k", "int", 0, "sample among the k most likely tokens; 0 is off"),
            Flag("top_p", "float", 1.0, "sample among the tokens that hold this share of the probability"),
            Flag("min_p", "float", 0.0, "drop tokens below this share of the most likely one"),
            Flag("repetition_penalty", "float", 1.0, "above 1 makes seen tokens less likely"),
            Flag("seed", "int", 0, "random seed of the sampling"),
            Flag("dtype", "text", None, "float32, bfloat16 or float16 (default: as stored)"),
        ),
        example='jaxmem generate --image=board.png --prompt="Which digit is in row 1, column 2?"',
    ),
    "study": Verb(
        "jaxmem.analysis.study:main",
        "train several arms with several seeds and compare them; running the same command again resumes",
        config="required",
        example="jaxmem study --config=configs/digits_benchmark.py",
    ),
    "reward": Verb(
        "jaxmem.training.rewards.cli:main",
        "show what reward functions give for the completions of a JSON-lines file",
        (
            Flag("function", "texts", [], "a built-in, package.module:function, or a JSON object; repeat for several"),
            Flag("timeout", "float", 10.0, "seconds that verifying one completion may take"),
            _JSON,
        ),
        argument="FILE",
        example="jaxmem reward completions.jsonl --function=pvm --function=math",
    ),
    "invocations": Verb(
        "jaxmem.analysis.invocations_cli:main",
        "show where a trained VisMem called for memory, by type and place",
        (_JSON,),
        argument="RUN",
        example="jaxmem invocations runs/digits_vismem/seed_0/3_invocation",
    ),
    "bank": Verb(
        "jaxmem.retrieval.cli:main",
        "build a bank of encoded knowledge items, add to it, check it, or search its index",
        (
            Flag("folder", "text", None, "the bank's folder"),
            Flag("items", "text", None, 'JSON lines, {"id": ..., "text": ..., "image": ...} each'),
            Flag("model", "text", None, "a Hugging Face folder (default: the shipped tiny backbone)"),
            Flag("memory", "text", None, "a folder with a trained CoMEM, which encodes the items"),
            _ENCODER,
            Flag("dtype", "text", None, "of the model: float32, bfloat16 or float16 (default: as stored)"),
            Flag("store", "text", "bfloat16", "how the bank holds embeddings: bfloat16, or int8 in half the room"),
            Flag("shard_items", "int", 1024, "items per file of the bank; what a kill can lose"),
            Flag("batch", "int", 16, "items that are encoded at once"),
            Flag("on_error", "text", "stop", "stop at items that cannot be used, or skip them into rejected.jsonl"),
            Flag("index", "text", None, "the folder of an index to search, or to put the items into"),
            Flag("index_kind", "text", "exact", "of an index that is made: exact, approximate or lance"),
            Flag("embedder", "text", None, "a Hugging Face folder of CLIP or SigLIP, which makes an index's vectors"),
            Flag("mode", "text", "image", "what of an item is indexed: image, text or mean (both)"),
            Flag("text", "text", None, "search: the question's words"),
            Flag("image", "texts", [], "search: the question's image; repeat for several"),
            Flag("k", "int", 10, "search: items to find"),
            _JSON,
        ),
        argument="ACTION",
        example="jaxmem bank build --folder=bank --items=items.jsonl --memory=runs/comem/memory",
    ),
    "eval": Verb(
        "jaxmem.evaluation.knowledge.cli:main",
        "score a model with and without memory on a knowledge benchmark; the same command again resumes",
        (
            Flag("benchmark", "text", None, "infoseek, oven, okvqa, aokvqa, viquae, mrag, cvqa or cvqa_comem"),
            Flag("questions", "texts", [], "a question file; repeat for several"),
            Flag(
                "annotations", "texts", [], "a file that belongs to them (types, answers, titles); repeat for several"
            ),
            Flag("images", "text", None, "folder of the questions' images (default: that of the question file)"),
            Flag("subset", "text", None, "a file with the ids to ask"),
            Flag("language", "text", "en", "of the questions, where the files do not say"),
            Flag("limit", "int", 0, "ask the first so many questions; 0 asks all"),
            Flag("model", "text", None, "a Hugging Face folder (default: the shipped tiny backbone)"),
            Flag("memory", "text", None, "a folder with a trained CoMEM"),
            _ENCODER,
            Flag("bank", "text", None, "its memory bank (jaxmem bank build)"),
            Flag("index", "text", None, "an index of the bank's items"),
            Flag("embedder", "text", None, "folder of the CLIP that made the index"),
            Flag("items", "text", None, "the items' file, for --condition=rag: banks hold no texts or images"),
            Flag("k", "int", 10, "items per question"),
            Flag("condition", "texts", [], "none, memory, shuffled or rag; repeat for several"),
            Flag("out", "text", None, "folder of the result files"),
            Flag("text_first", "bool", False, "put a question's words before its image"),
            Flag("query_images", "text", "squash", "questions' images: squash, square, stored or pooled"),
            Flag("decode", "text", "greedy", "greedy, or comem: temperature 0.1, top_p 0.001, penalty 1.05"),
            Flag("max_new_tokens", "int", 0, "stop replies after so many tokens; 0 is 1000"),
            Flag("batch_size", "int", 8, "questions that are answered together"),
            Flag("seed", "int", 0, "of the shuffling, and of sampling"),
            Flag("dtype", "text", None, "float32, bfloat16 or float16 (default: as stored)"),
            _JSON,
        ),
        example="jaxmem eval --benchmark=okvqa --questions=Q.json --annotations=A.json --images=val2014 --out=runs/ok",
    ),
    "synthesise": Verb(
        "jaxmem.training.synthesis.cli:main",
        "make CoMEM's training data from a model's own right answers; the same command again resumes",
        (_JSON,),
        config="required",
        example="jaxmem synthesise --config=configs/comem_synthesis.py",
    ),
    "assemble": Verb(
        "jaxmem.checkpoints.assemble:main",
        "join a decoder and a CLIP or SigLIP folder to a LLaVA-style backbone with a fresh projector",
        (
            Flag("text", "text", None, "Hugging Face folder of a Qwen2, Qwen2.5, Qwen3, Llama or Mistral decoder"),
            Flag("vision", "text", None, "of a CLIP or SigLIP"),
            Flag("output", "text", None, "the folder to write"),
            Flag(
                "projector", "text", "mlp", "mlp, avgpool, ldpv2, tokenpacker, pixel_shuffle, c_abstractor, resampler"
            ),
            Flag("ratio", "int", 1, "patches per token and side"),
            Flag("aspect", "text", "anyres", "anyres (tiles), or single (one square)"),
            Flag("seed", "int", 0, "of the projector"),
            Flag("dtype", "text", None, "float32, bfloat16 or float16 (default: as stored)"),
        ),
        example="jaxmem assemble --text=Qwen2-1.5B --vision=clip-336 --projector=avgpool --ratio=2 --output=llava",
    ),
    "export": Verb(
        "jaxmem.export.cli:main",
        "write a folder for PyTorch, and prove it by loading it there",
        (
            Flag(
                "to", "text", "hf", "hf (with the memory's code), peft, merged (plain backbone), original (a paper's)"
            ),
            Flag("model", "text", None, "a Hugging Face folder (default: the shipped tiny backbone)"),
            Flag("memory", "text", None, "a folder with a trained memory"),
            Flag("lora", "text", None, "a PEFT folder with factors of the backbone"),
            Flag("output", "text", None, "the folder to write; must not exist"),
            Flag("dtype", "text", None, "float32, bfloat16 or float16 (default: as stored)"),
            Flag("max_shard_mb", "int", 5000, "megabytes per file of weights"),
            Flag("unproven", "bool", False, "do not load the folder in torch"),
        ),
        example="jaxmem export --to=hf --model=Qwen3-VL-8B --memory=runs/pvm/memory --output=pvm-hf",
    ),
    "prove": Verb(
        "jaxmem.export.cli:prove_main",
        "load a folder here and in torch, and compare what the two say",
        (
            Flag("model", "text", None, "of export --to=hf or merged, or a backbone (default: the shipped tiny one)"),
            Flag("trust_remote_code", "bool", False, "run the code that an exported folder brings"),
            Flag("card", "bool", False, "write what was found into the folder's model card"),
        ),
        example="jaxmem prove --model=pvm-hf --trust_remote_code --card",
    ),
    "import": Verb(
        "jaxmem.export.original:main",
        "read a memory that a paper's own code trained",
        (
            Flag("memory", "text", None, "pvm, vismem or comem"),
            Flag("source", "text", None, "its file or folder"),
            Flag("model", "text", None, "the backbone's Hugging Face folder (default: the shipped tiny backbone)"),
            Flag("output", "text", None, "the folder to write, for --memory of other verbs"),
            Flag("allow_pickle", "bool", False, "open pickled files; tensors alone are read"),
        ),
        example="jaxmem import --memory=comem --source=checkpoint-800 --model=Qwen2.5-VL-7B-Instruct --output=memory",
    ),
    "plan": Verb(
        "jaxmem.planning.cli:main",
        "say what a run would need on a TPU pod or GPUs, without having them",
        (
            Flag("topology", "texts", [], "chips and shape, v5e:4x4 or h100:2x8 (nodes x GPUs); repeat for a table"),
            Flag("mesh", "texts", [], "axes such as fsdp=4,sequence=4 instead of config.mesh; repeat for a table"),
            Flag("tokens", "int", 0, "length of the planned rows; 0 is the longest of config.data.buckets"),
            Flag("patches", "int", 0, "image patches of the planned rows; 0 is the longest of config.data.buckets"),
            Flag("sweep", "bool", False, "one line per topology, mesh and program"),
            Flag("scaling_svg", "text", None, "draw weak scaling to this file; the batch grows with the chips"),
            _JSON,
        ),
        config="required",
        example="jaxmem plan --config=configs/pvm_qwen3vl.py:8b --topology=v5e:4x4",
    ),
    "bench": Verb(
        "jaxmem.bench.run:main",
        "measure jaxmem against its peer in one run",
        (_JSON,),
        argument="NAME",
        example="jaxmem bench decode --json",
    ),
    "doctor": Verb(
        "jaxmem.doctor:main",
        "show versions, devices, memory and what is missing for what",
        (Flag("checkpoint", "text", None, "a run's folder: verify its checkpoints instead"), _JSON),
        example="jaxmem doctor",
    ),
}
