"use strict";
// The map: what a dot stands for, shown when it is pointed at or focused. All text is set as text.

const REACH = 26; // pixels within which the nearest dot counts as pointed at

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function place(it, times) {
  if (it.cluster === null) return [element("p", `Kept in ${times}. It is of the tail, and keeps its own words.`, "note")];
  return [
    element("p", `Kept in ${times}. Cluster ${it.cluster}, represented by:`, "note"),
    element("p", it.representative, "text representative"),
  ];
}

function fill(card, it) {
  const names = { same: "span", added: "ins", removed: "del", gap: "span" };
  const times = it.support === 1 ? "1 trajectory" : `${it.support.toLocaleString("en")} trajectories`;
  const example = element("p", undefined, "text");
  example.append(...it.example.map(([kind, text]) => element(names[kind], text, kind === "gap" ? "gap" : "")));
  card.replaceChildren(
    element("p", it.principle, "text principle"),
    ...place(it, times),
    element("p", "The refinement that it improved most:", "note"),
    it.example.length ? example : element("p", "No trajectory was kept with it.", "note"),
  );
}

function wire(map) {
  const plane = map.querySelector(".plane");
  if (!plane) return;
  const card = map.querySelector(".card");
  const facts = JSON.parse(map.querySelector("script").textContent);
  const dots = [...plane.querySelectorAll(".dot")];
  let chosen = -1;

  function choose(number) {
    if (number === chosen) return;
    if (chosen >= 0) dots[chosen].classList.remove("chosen");
    dots.forEach((dot, i) => {
      dot.setAttribute("tabindex", i === number ? 0 : -1);
      dot.classList.toggle("far", facts[i].cluster !== facts[number].cluster);
    });
    dots[number].classList.add("chosen");
    chosen = number;
    fill(card, facts[number]);
  }

  function nearest(event) {
    const distances = dots.map((dot) => {
      const box = dot.getBoundingClientRect();
      return Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
    });
    const least = Math.min(...distances);
    return least <= REACH ? distances.indexOf(least) : -1;
  }

  function point(event) {
    const number = nearest(event);
    if (number >= 0) choose(number);
  }

  dots.forEach((dot, i) => {
    dot.setAttribute("tabindex", i === 0 ? 0 : -1);
    dot.setAttribute("role", "img");
    dot.setAttribute("aria-label", facts[i].principle);
    dot.addEventListener("focus", () => choose(i));
  });
  plane.addEventListener("pointermove", point);
  plane.addEventListener("pointerdown", point);
  plane.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    dots[(Math.max(chosen, 0) + step + dots.length) % dots.length].focus();
  });
}

document.querySelectorAll(".map").forEach(wire);

// Where a row does not fit, the style shows it as a list, whose lines begin with their column's title.
document.querySelectorAll("table").forEach((table) => {
  const titles = [...table.querySelectorAll("thead th")].map((title) => title.textContent);
  table.querySelectorAll("tbody tr").forEach((row) =>
    [...row.cells].forEach((cell, i) => (cell.dataset.label = titles[i])),
  );
});

document.querySelectorAll(".choose").forEach((chooser) => {
  const radios = [...chooser.querySelectorAll("input")];
  const show = () => radios.forEach((radio) => (document.getElementById(radio.value).hidden = !radio.checked));
  chooser.addEventListener("change", show);
  show();
});

addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((it) => (it.open = true)));
