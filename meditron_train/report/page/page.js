"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 760px)");
  const themes = {
    light: { ink: "#1d2129", soft: "#565d6b", line: "#e6e7e5", card: "#ffffff",
      palette: ["#2f6fed", "#c2560a", "#0d8a7e", "#a52bc2", "#5c8a0a", "#c9302c", "#0b7fb8", "#8a5a14"] },
    dark: { ink: "#e6e8ec", soft: "#a6adba", line: "#30343c", card: "#1c1f25",
      palette: ["#7aa5ff", "#ff9f5a", "#4fd1c2", "#df94f5", "#a6d65c", "#ff8f88", "#66c3f2", "#deb06c"] },
  };

  // Six hexadecimal digits and a share of opacity.
  const faint = (color, share) => color + Math.round(share * 255).toString(16).padStart(2, "0");

  function colored(trace, theme) {
    const color = theme.palette[trace.meta.color % theme.palette.length];
    const line = { width: 2, ...trace.line, color: trace.meta.faint ? faint(color, 0.35) : color };
    if (trace.meta.faint) line.width = 1;
    return { ...trace, line, marker: { size: 6, ...trace.marker, color },
      ...(trace.stackgroup ? { fillcolor: faint(color, 0.55) } : {}) };
  }

  function layoutOf(chart, theme, width) {
    const axis = { gridcolor: theme.line, linecolor: theme.line, zerolinecolor: theme.line, automargin: true,
      tickfont: { color: theme.soft }, exponentformat: "B" };
    const titled = (own) => ({ ...axis, ...own, title: { standoff: 8, ...(own || {}).title, font: { color: theme.soft, size: 12 } } });
    return {
      ...chart.layout, xaxis: titled(chart.layout.xaxis), yaxis: titled(chart.layout.yaxis),
      autosize: width === null, ...(width === null ? {} : { width, height: 260 }),
      paper_bgcolor: theme.card, plot_bgcolor: theme.card, margin: { l: 8, r: 12, t: 12, b: 8 },
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, Liberation Sans, sans-serif", size: 12, color: theme.ink },
      hovermode: chart.layout.hovermode || "x unified",
      hoverlabel: { bgcolor: theme.card, bordercolor: theme.line, font: { color: theme.ink } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: theme.ink } },
      dragmode: narrow.matches ? false : "zoom", // a finger scrolls the page
    };
  }

  function draw(chart, name, width) {
    const place = document.getElementById("plot-" + chart.name);
    const theme = themes[name];
    return Plotly.react(place, chart.traces.map((trace) => colored(trace, theme)), layoutOf(chart, theme, width),
      { displaylogo: false, responsive: width === null, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
        displayModeBar: narrow.matches ? false : "hover" });
  }

  const current = () => (dark.matches ? "dark" : "light");
  const drawAll = () => charts.forEach((chart) => draw(chart, current(), null));

  async function drawOneByOne() {
    for (const chart of charts) {
      await draw(chart, current(), null);
      await new Promise((resolve) => setTimeout(resolve)); // the page can be scrolled meanwhile
    }
    document.documentElement.dataset.drawnMs = Math.round(performance.now());
    document.documentElement.dataset.drawn = "yes";
  }

  drawOneByOne();
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => charts.forEach((chart) => draw(chart, "light", 680)));
  addEventListener("afterprint", drawAll);

  const refresh_s = Number(document.body.dataset.refreshS);
  if (refresh_s > 0 && location.protocol.startsWith("http")) {
    setInterval(() => { if (!document.hidden && !document.querySelector("details[open]")) location.reload(); }, 1000 * refresh_s);
  }
})();
