// What every part of the page uses. Text only ever enters the document as text.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function say(text, state = "") {
  $("status").textContent = text;
  $("status").dataset.state = state;
}

export function format(value) {
  return value == null ? "" : value >= 100 ? value.toFixed(0) : value.toFixed(1);
}

export function shuffle(items) {
  for (let last = items.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [items[last], items[other]] = [items[other], items[last]];
  }
  return items;
}
