"""How the page looks, in light and in dark."""

import gradio as gr

SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]  # none from elsewhere
THEME = gr.themes.Soft(
    primary_hue="teal", neutral_hue="slate", font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"]
)
CSS = """\
.gradio-container{max-width:1240px!important;margin:0 auto!important}
#head h1{font-size:1.6rem;margin:.2rem 0 .1rem;overflow-wrap:anywhere}
#head p{margin:0;color:var(--body-text-color-subdued)}
#asking{max-width:400px}
#examples,#examples .gallery-container,#examples .grid-wrap{height:auto!important;min-height:0!important;
max-height:none!important;overflow:visible!important}
#examples .grid-container{grid-template-columns:repeat(4,minmax(0,1fr))!important;padding:.5rem!important;gap:.5rem}
#examples .thumbnail-item{width:100%!important;height:auto!important;aspect-ratio:1}
#examples .caption-label{font-size:.75rem;padding:.1rem .4rem;left:auto;right:.2rem;bottom:.2rem}
#cards{align-items:stretch;gap:.8rem}
.card{background:var(--background-fill-primary);border:1px solid var(--border-color-primary);border-radius:.8rem;
padding:.8rem;gap:.4rem!important}
.card:not(:has(figure)){display:none}
.card figure{margin:0}.card figcaption{margin-bottom:.4rem;line-height:1.35}
.card figcaption b,.card figcaption span{display:block}
.card figcaption span,.card .facts,.card .quiet{color:var(--body-text-color-subdued);font-size:.85rem}
.card img{width:100%;max-height:300px;object-fit:contain;border-radius:.4rem;image-rendering:auto}
.card .answer{font-size:1.05rem;line-height:1.45;margin:.2rem 0;min-height:3rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.card .quiet{font-size:.95rem}
.card .facts{margin:0;min-height:1.2rem}
.gradio-container:has(#stop) .more::after{content:"\\258d";opacity:.6}
.remark{margin:0;padding:.7rem 1rem;border-radius:.8rem;background:var(--background-fill-primary);
border:1px solid var(--border-color-primary)}
.remark.verdict{border-color:var(--color-accent);border-left-width:.4rem;font-weight:600}
.remark.bad{border-color:#d64545;border-left-width:.4rem}
footer{display:none!important}
@media(max-width:768px){#asking{max-width:none}#examples .caption-label{display:none}
.gradio-container{padding:0!important}}
"""
