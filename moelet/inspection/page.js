// The page of `moelet inspect`: choose a layer, and see one expert's tokens alone. Without it all layers are shown.
(() => {
  const nav = document.querySelector("nav.layers");
  const buttons = [...nav.querySelectorAll("button")];
  const parts = [...document.querySelectorAll("[data-layer]")];
  const legend = [...document.querySelectorAll(".legend button")];
  const hues = legend.map((button) => button.style.getPropertyValue("--hue"));
  const split = (text) => text.split("|").map((layer) => layer.split(" ").map(Number));
  const tokens = [...document.querySelectorAll(".shaded span")].map((node) => ({
    node, experts: split(node.dataset.experts), weights: split(node.dataset.weights), name: node.title,
  }));
  let layer = Number(nav.dataset.first);
  let alone = null;

  function paint() {
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", k === layer));
    legend.forEach((button, k) => button.setAttribute("aria-pressed", k === alone));
    parts.forEach((part) => { part.hidden = Number(part.dataset.layer) !== layer; });
    for (const { node, experts, weights, name } of tokens) {
      const chosen = experts[layer];
      const place = alone === null ? 0 : chosen.indexOf(alone);
      node.style.setProperty("--hue", hues[chosen[Math.max(place, 0)]]);
      node.className = place < 0 ? "dim" : place > 0 ? "later" : "";
      node.title = `${name}: ` + chosen.map((e, k) => `expert ${e} (${weights[layer][k]})`).join(", ");
    }
  }

  buttons.forEach((button, k) => button.addEventListener("click", () => { layer = k; paint(); }));
  legend.forEach((button, k) => button.addEventListener("click", () => { alone = alone === k ? null : k; paint(); }));
  nav.hidden = false;
  legend.forEach((button) => { button.disabled = false; });
  paint();
})();
