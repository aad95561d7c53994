// What the page does in the browser by itself: examples, the gallery (kept in this browser only), settings to copy, light and dark.
// Texts of visitors enter the page through textContent and attributes, never as HTML.
"use strict";
window.flowt2i = (() => {
  const EVERYTHING = { childList: true, subtree: true, characterData: true, attributes: true };
  const KEY = "flowt2i-gallery", THEME = "flowt2i-theme", MOST = 48;
  const self = { chosen: "" };
  let kept = [], settings = null, shown = null;
  try { kept = JSON.parse(localStorage.getItem(KEY)) || []; } catch { kept = []; }

  function make(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  function save() {
    while (true) {
      try { localStorage.setItem(KEY, JSON.stringify(kept)); return; }
      catch { if (!kept.length) return; kept.pop(); }  // the browser's room is used up: the oldest go first
    }
  }

  function fileName(item) {
    const words = item.settings.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-+|-+$/g, "");
    return `${words || "picture"}-${item.settings.seed}.png`;
  }

  async function copy(text, button) {
    try { await navigator.clipboard.writeText(text); }
    catch {  // no permission, or not a secure page
      const area = document.body.appendChild(make("textarea", { value: text }));
      area.select(); document.execCommand("copy"); area.remove();
    }
    const before = button.textContent;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }

  function cell(item, trigger) {
    const image = make("img", { src: item.source, alt: item.settings.prompt, title: item.settings.prompt, loading: "lazy" });
    image.classList.toggle("crisp", item.crisp);
    const use = make("button", { textContent: "Use", title: "put these settings into the page", onclick: () => { settings = item.settings; trigger("click"); } });
    const text = JSON.stringify(item.settings);
    const take = make("button", { textContent: "Copy", title: text, className: "copy", onclick: () => copy(text, take) });
    const file = make("a", { textContent: "PNG", href: item.source, download: fileName(item), title: "download" });
    const caption = make("figcaption", { textContent: item.settings.prompt, dir: "auto" });
    const { steps, solver, guidance, seed } = item.settings;
    const facts = make("small", { textContent: `${steps} ${solver}, guidance ${guidance}, seed ${seed}` });
    return make("figure", {}, image, caption, facts, make("div", { className: "actions" }, use, take, file));
  }

  function show() {
    if (!shown) return;
    const { element, trigger } = shown, place = element.querySelector(".gallery");
    place.replaceChildren();
    if (!kept.length) return;
    const clear = make("button", { textContent: "Clear", onclick: () => { kept = []; save(); show(); } });
    place.append(
      make("div", { className: "head" }, make("h2", { textContent: "Your pictures" }), make("span", { textContent: "kept in this browser only" }), clear),
      make("div", { className: "cells" }, ...kept.map((item) => cell(item, trigger))),
    );
  }

  function remember(element) {
    const fresh = [...element.querySelectorAll(".board.done figure[data-settings]")].map((figure) => ({
      settings: JSON.parse(figure.dataset.settings),
      source: figure.querySelector("img").src,
      crisp: !!figure.closest(".crisp"),
    }));
    const key = (item) => JSON.stringify(item.settings), known = new Set(kept.map(key));
    const added = fresh.filter((item) => !known.has(key(item)));
    if (!added.length) return;
    kept = [...added, ...kept].slice(0, MOST);
    save();
    show();
  }

  function dark(on) {
    document.body.classList.toggle("dark", on);
    document.documentElement.style.colorScheme = on ? "dark" : "light";
  }

  self.theme = (element) => {
    const stored = localStorage.getItem(THEME);
    if (stored) dark(stored === "dark");
    element.addEventListener("click", (event) => {
      if (!event.target.closest(".theme")) return;
      const on = !document.body.classList.contains("dark");
      localStorage.setItem(THEME, on ? "dark" : "light");
      dark(on);
    });
  };
  self.chips = (element, trigger) => element.addEventListener("click", (event) => {
    const chip = event.target.closest(".chip");
    if (chip) { self.chosen = chip.textContent; trigger("click"); }
  });
  self.watch = (element) => new MutationObserver(() => remember(element)).observe(element, EVERYTHING);
  self.gallery = (element, trigger) => { shown = { element, trigger }; show(); };
  self.again = () => {
    const { model, prompt, negative, steps, guidance, solver, seed, num, shape } = settings;
    return [model, prompt, negative || "", steps, guidance, solver, seed, num, shape || ""];
  };
  self.stopping = (id) => {
    const line = document.querySelector(`#${id} .board.busy .line`);
    if (line) line.textContent = "stopping";
  };
  self.ended = (id) => {  // gradio has let go of the drawing: only now does it hear the next press of the button
    const board = document.querySelector(`#${id} .board.busy`);
    if (!board) return;
    board.classList.replace("busy", "halted");
    board.querySelector(".line").textContent = "stopped";
  };
  self.address = (element) => { element.querySelector(".address").textContent = location.origin; };
  return self;
})();
