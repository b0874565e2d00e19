"""How a report looks. It has no script: choosing a region and a theme is CSS alone, so nothing can be injected."""

from __future__ import annotations

_LIGHT = """
  --ground:#f6f6f4; --card:#fff; --ink:#1d1f22; --soft:#5c6066; --line:#dfe0dd; --mark:#eef1f6; --accent:#1c5fa8;
  --positive:#b2182b; --negative:#2166ac; --score:#878c95; --shadow:0 1px 2px #0001,0 2px 8px #0000000d;"""
_DARK = """
  --ground:#131518; --card:#1c1f24; --ink:#e9eaec; --soft:#a3a8b0; --line:#343941; --mark:#272d37; --accent:#8cbcf2;
  --positive:#f0816f; --negative:#74b0e8; --score:#8b919b; --shadow:none;"""

_BASE = """
*,*::before,*::after{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--ground);color:var(--ink);
  font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",Ubuntu,Cantarell,sans-serif}
main,body>header,body>footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
h1,h2,h3,p{margin:0}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.15rem;line-height:1.3;overflow-wrap:anywhere}
h3{font-size:.95rem}
a{color:var(--accent);text-underline-offset:.15em}
bdi{overflow-wrap:anywhere}
.soft{color:var(--soft);font-size:.875rem}
.skip{position:absolute;left:-999rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem 1rem;z-index:3}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}

body>header{display:flex;flex-wrap:wrap;gap:.75rem 2rem;justify-content:space-between;align-items:flex-start;
  padding-top:2rem;padding-bottom:1rem}
body>header>div{flex:1 1 20rem;min-width:0}
body>header .soft{margin-top:.35rem}
.theme{border:1px solid var(--line);border-radius:.5rem;display:inline-flex;margin:0;padding:.15rem;gap:.1rem;
  background:var(--card);font-size:.8125rem}
.theme label{padding:.2rem .65rem;border-radius:.35rem;cursor:pointer;color:var(--soft)}
.theme label:has(:checked){background:var(--mark);color:var(--ink)}
.theme label:has(:focus-visible){outline:2px solid var(--accent)}
.theme input{position:absolute;opacity:0;pointer-events:none}

.guide{display:flex;flex-wrap:wrap;gap:.25rem 1.5rem;padding:0 0 1rem;margin:0}
.index{margin-bottom:1.25rem}
.index summary,.about summary{cursor:pointer;color:var(--soft);font-size:.875rem}
.index ol{list-style:none;margin:.6rem 0 0;padding:0;display:grid;gap:.6rem 1.5rem;
  grid-template-columns:repeat(auto-fill,minmax(min(100%,14rem),1fr));font-size:.875rem}
.index li,.index .soft,.index a{min-width:0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.index .soft,.index a{display:block}
.index a{width:fit-content;max-width:100%}

.example,.about{background:var(--card);border:1px solid var(--line);border-radius:.75rem;box-shadow:var(--shadow);
  padding:1.25rem;margin:0 0 1.25rem}
.example>header{display:flex;flex-wrap:wrap;gap:.15rem 1rem;align-items:baseline;justify-content:space-between;
  margin-bottom:1rem}
.for strong{color:var(--ink);font-weight:600}
.body{display:grid;gap:1.25rem 2rem;grid-template-columns:minmax(0,25rem) minmax(0,1fr);align-items:start}
.stage{margin:0;position:sticky;top:1rem}
.frame{position:relative;width:min(100%,calc(30rem*var(--w)/var(--h)));aspect-ratio:var(--w)/var(--h);margin:0 auto;
  overflow:hidden;border-radius:.4rem;background:var(--mark)}
.frame img{position:absolute;inset:0;width:100%;height:100%;display:block}
.frame .base{transition:filter .12s}
.frame .map{visibility:hidden}
.pixels{image-rendering:pixelated}
.stage figcaption{margin-top:.6rem}
.legend{display:grid;grid-template-columns:auto 1fr auto;gap:.5rem;align-items:center;
  font-variant-numeric:tabular-nums}
.legend .ramp{height:.6rem;border-radius:.3rem;min-width:3rem;border:1px solid var(--line)}

.concepts{border-collapse:collapse;width:100%;font-size:.9375rem}
.concepts caption{text-align:left;padding-bottom:.4rem}
.concepts thead th{font-weight:500;font-size:.8125rem;color:var(--soft);text-align:left;padding:0 .5rem .35rem;
  vertical-align:bottom;line-height:1.3}
.concepts td,.concepts tbody th{padding:.4rem .5rem;border-top:1px solid var(--line);text-align:left;
  vertical-align:middle}
.concepts tbody tr{position:relative;cursor:pointer}
.concepts tbody tr:hover,.concepts tbody tr:has(input:checked){background:var(--mark)}
.concepts tbody tr:has(input:focus-visible){outline:2px solid var(--accent);outline-offset:-2px;border-radius:.3rem}
.concepts .pick{width:5.4rem;padding-left:.4rem}
.concepts .pick label::after{content:"";position:absolute;inset:0;cursor:pointer}
.concepts .pick input{position:absolute;opacity:0;pointer-events:none}
.concepts .pick img{display:block;width:auto;height:auto;max-width:4.75rem;max-height:4.75rem;border-radius:.3rem}
.concepts tbody th{font-weight:600;min-width:6rem}
.concepts tbody th small{display:block;font-weight:400;color:var(--soft);overflow-wrap:anywhere}
.concepts tr.input th{font-weight:400;color:var(--soft);font-size:.875rem}
.concepts tr.absent th,.concepts tr.absent td{color:var(--soft)}
.concepts tr.absent img{filter:grayscale(1) opacity(.55)}
.number{display:block;font-variant-numeric:tabular-nums;white-space:nowrap;line-height:1.3}
.score{width:22%}
.how{width:34%}
.bar{display:block;position:relative;height:.5rem;margin-top:.2rem;border-radius:.15rem;background:var(--mark)}
tr:hover .bar,tr:has(input:checked) .bar{background:var(--card)}
.bar i{position:absolute;top:0;bottom:0;border-radius:.15rem}
.score .bar i{left:0;width:calc(100%*var(--v)/var(--score-end));background:var(--score)}
.how .bar::after{content:"";position:absolute;left:50%;top:-.15rem;bottom:-.15rem;width:1px;background:var(--ink)}
.how .bar i{width:calc(50%*var(--v)/var(--how-end))}
.how .bar .for{left:50%;background:var(--positive)}
.how .bar .against{right:50%;background:var(--negative)}

.about h2{margin-bottom:.75rem}
.about h3{margin:1.1rem 0 .35rem;color:var(--soft);font-weight:600}
.wide{overflow-x:auto}
.facts{border-collapse:collapse;width:100%;font-size:.875rem}
.facts th,.facts td{text-align:left;vertical-align:top;padding:.3rem .75rem .3rem 0;border-top:1px solid var(--line);
  overflow-wrap:anywhere}
.facts th{font-weight:500}
.facts tbody th[scope=row]{width:14rem;color:var(--soft);font-weight:400}
.facts code{font:.8125rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.about details{margin-top:1.1rem}
.about details .wide{margin-top:.5rem}
body>footer{padding-bottom:2.5rem}

@media (max-width:52rem){
  .body{grid-template-columns:minmax(0,1fr);gap:.5rem}
  .stage{top:0;z-index:2;background:var(--card);padding:.4rem 0 .5rem}
  .frame{width:min(100%,calc(40vh*var(--w)/var(--h)))}
  .legend{max-width:40rem;margin:0 auto}
}
@media (max-width:34rem){
  body>header{padding-top:1.25rem}
  h1{font-size:1.4rem}
  main,body>header,body>footer{padding-left:.75rem;padding-right:.75rem}
  .example,.about{padding:.9rem .75rem}
  .concepts td,.concepts tbody th,.concepts thead th{padding-left:.3rem;padding-right:.3rem}
  .concepts .pick{width:4rem;padding-left:.15rem}
  .concepts .pick img{max-width:3.5rem;max-height:3.5rem}
  .concepts tbody th{min-width:5.6rem}
  .score{width:3.9rem}
  .how{width:6.6rem}
  .concepts{font-size:.875rem}
  .index ol{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
  .facts tbody th[scope=row]{width:8rem}
}
@media (prefers-reduced-motion:reduce){*{transition:none!important}}
@media print{
  @page{margin:14mm}
  body{font-size:10pt}
  .theme,.skip,.index,.concepts tr.input{display:none}
  main,body>header,body>footer{max-width:none;padding-left:0;padding-right:0}
  .example,.about{box-shadow:none;border-color:#bbb;padding:4mm}
  .example{break-inside:avoid}
  .stage{position:static}
  .body{grid-template-columns:55mm minmax(0,1fr);gap:6mm}
  .frame,.bar,.ramp{-webkit-print-color-adjust:exact;print-color-adjust:exact}
  .bar i{-webkit-print-color-adjust:exact;print-color-adjust:exact}
  .concepts tr{break-inside:avoid}
  .concepts tbody th{min-width:8rem}
  .score{width:18%}
  .how{width:28%}
  .concepts tbody tr:has(input:checked){background:none}
  .example .frame .map{visibility:hidden!important}
  .example .frame .base{filter:none!important}
  details::details-content{content-visibility:visible;display:block}
}
"""


def style(most: int, score_end: float, contribution_end: float) -> str:
    """The style sheet.

    Args:
        most: the largest number of concepts of an image.
        score_end, contribution_end: values at the ends of the bars.
    """
    light, dark = "{color-scheme:light;" + _LIGHT + "}", "{color-scheme:dark;" + _DARK + "}"
    shown, muted = [], []
    for k in range(most):
        # A row under the pointer is looked at first, the chosen one otherwise.
        for state in (f":has(.c{k}:hover)", f":not(:has(tbody tr:hover)):has(.c{k} input:checked)"):
            shown.append(f".example{state} .m{k}")
            muted.append(f".example{state} .base")
    choice = ""
    if most:
        choice = ",\n".join(shown) + "{visibility:visible}\n" + ",\n".join(muted) + "{filter:saturate(.3)}\n"
    return (
        f":root{light}\n@media (prefers-color-scheme:dark){{:root{dark}}}\n"
        f":root:has(#theme-light:checked){light}\n:root:has(#theme-dark:checked){dark}\n"
        f"@media print{{:root,:root:has(#theme-dark:checked){light}}}\n"
        f":root{{--score-end:{score_end:g};--how-end:{contribution_end:g}}}\n{_BASE}{choice}"
    )
