"""The words of prompts in the languages that CoMEM evaluates (arXiv 2505.17670, table 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Words:
    """What a prompt says in one language.

    Attributes:
      question: label of the question.
      think: asks to reason; `think_given` to do so with what stands before the question.
      short: asks for few words.
      form: introduces the two lines of the reply.
      reasoning: label and content of the first; final: label of the second; brief: what stands in its box.
      options: label of the choices.
      number: asks for an option's number.
      answer: further words for an answer, by which one is recognised without a box.
    """

    question: str
    think: str
    think_given: str
    short: str
    form: str
    reasoning: str
    final: str
    brief: str
    options: str
    number: str
    answer: tuple[str, ...]


LANGUAGES: Mapping[str, Words] = {
    "en": Words(
        "Question",
        "Work out the answer step by step.",
        "Work out the answer step by step, with the help of the given information.",
        "Keep the final answer short and concise.",
        "Write your reply in this form:",
        "Reasoning process: every step of your thinking",
        "Final answer",
        "the answer in a few words",
        "Options",
        "Choose one option. The final answer is its number alone.",
        ("answer",),
    ),
    "zh": Words(
        "问题",
        "请一步一步推理，得出答案。",
        "请结合给出的信息一步一步推理，得出答案。",
        "最终答案要简短明了。",
        "请按以下格式作答：",
        "推理过程: 全部思考步骤",
        "最终答案",
        "简短的答案",
        "选项",
        "请选择一个选项，最终答案只写它的编号。",
        ("答案",),
    ),
    "es": Words(
        "Pregunta",
        "Razona paso a paso hasta llegar a la respuesta.",
        "Razona paso a paso, con ayuda de la información dada, hasta llegar a la respuesta.",
        "La respuesta final debe ser breve y concisa.",
        "Responde de esta forma:",
        "Proceso de razonamiento: todos los pasos",
        "Respuesta final",
        "la respuesta en pocas palabras",
        "Opciones",
        "Elige una opción. La respuesta final es solo su número.",
        ("respuesta",),
    ),
    "ru": Words(
        "Вопрос",
        "Рассуждай шаг за шагом и найди ответ.",
        "Рассуждай шаг за шагом с помощью данных сведений и найди ответ.",
        "Окончательный ответ должен быть кратким и ясным.",
        "Ответь в таком виде:",
        "Ход рассуждений: все шаги",
        "Окончательный ответ",
        "ответ в нескольких словах",
        "Варианты",
        "Выбери один вариант. Окончательный ответ — только его номер.",
        ("ответ",),
    ),
    "pt": Words(
        "Pergunta",
        "Raciocine passo a passo até chegar à resposta.",
        "Raciocine passo a passo, com a ajuda das informações dadas, até chegar à resposta.",
        "A resposta final deve ser curta e concisa.",
        "Responda desta forma:",
        "Processo de raciocínio: todos os passos",
        "Resposta final",
        "a resposta em poucas palavras",
        "Opções",
        "Escolha uma opção. A resposta final é apenas o seu número.",
        ("resposta",),
    ),
    "bg": Words(
        "Въпрос",
        "Разсъждавай стъпка по стъпка и намери отговора.",
        "Разсъждавай стъпка по стъпка с помощта на дадените сведения и намери отговора.",
        "Крайният отговор трябва да е кратък и ясен.",
        "Отговори в този вид:",
        "Ход на разсъжденията: всички стъпки",
        "Краен отговор",
        "отговорът в няколко думи",
        "Възможности",
        "Избери една възможност. Крайният отговор е само нейният номер.",
        ("отговор", "отговорът"),
    ),
}
