"""System prompt and sampling, folded away below the chat."""

from typing import Any

import gradio as gr

from tove_llava.serve.ui.conversation import MAX_TEXT


def sampling_inputs(max_new_tokens: int) -> list[Any]:
    """Components for the system prompt, temperature, top-p and the longest answer, in ``Settings.of``'s order."""
    with gr.Accordion("Settings", open=False, elem_id="tove-settings"):
        system = gr.Textbox(
            value="",
            label="System prompt",
            placeholder="the model's own",
            lines=2,
            max_lines=6,
            max_length=MAX_TEXT,
            elem_id="tove-system",
        )
        with gr.Row():
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: always the likeliest word")
            top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="draws from the likeliest words alone")
            longest = gr.Slider(
                1,
                max(max_new_tokens, 1),
                value=max_new_tokens,
                step=1,
                label="Max tokens",
                info="where an answer is cut",
                elem_id="tove-longest",
            )
    return [system, temperature, top_p, longest]
