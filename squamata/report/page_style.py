"""How the page looks, and how it tells that something in it failed."""

STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f5f4; color: #26323a; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0; } h2 { font-size: 20px; margin: 36px 0 10px; } h3 { font-size: 16px; }
.lead { font-size: 17px; margin-top: 4px; color: #4b5a63; }
.card { background: white; border: 1px solid #e0e5e3; border-radius: 8px; padding: 12px; margin: 12px 0; }
.wide { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13px; }
th { text-align: left; font-weight: 600; color: #4b5a63; vertical-align: bottom; background: #f8faf9; }
th, td { padding: 7px 10px; border-bottom: 1px solid #e9edeb; }
td:nth-child(n+4), th:nth-child(n+4) { text-align: right; }
tr:last-child td { border-bottom: 0; } tr:hover td { background: #f6faf8; }
td:nth-child(-n+3) { white-space: nowrap; }
td small { display: block; color: #7d8a91; font-size: 11px; white-space: nowrap; }
.worse, td small.worse { color: #b5493b; } td small.better { color: #2a7f62; }
details { margin: 6px 0; } summary { cursor: pointer; color: #2a7f62; }
pre { background: white; border: 1px solid #e0e5e3; border-radius: 8px; padding: 12px; overflow-x: auto; }
pre { font-size: 12px; }
#failures { background: #fbe9e6; border: 1px solid #b5493b; border-radius: 8px; padding: 10px 14px; }
footer { margin-top: 40px; color: #7d8a91; font-size: 12px; }
"""

WATCH = """
window.squamataFailures = [];
window.addEventListener('error', event => {
  window.squamataFailures.push(event.message || ('could not load ' + (event.target.src || event.target.href)));
}, true);
"""

END = """
window.addEventListener('load', () => {
  document.querySelectorAll('details').forEach(part => part.addEventListener('toggle', () =>
    part.querySelectorAll('.js-plotly-plot').forEach(plot => Plotly.Plots.resize(plot))));
  if (window.squamataFailures.length) {
    const told = document.createElement('p');
    told.id = 'failures';
    told.textContent = 'Some of this page could not be drawn: ' + window.squamataFailures.join('; ');
    document.querySelector('main').prepend(told);
  }
});
"""
