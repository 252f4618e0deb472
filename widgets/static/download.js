// Files that the browser saves: data from Python, and pictures of figures.

import { html } from "./shared.js";

/** Saves data under a name, as a download. */
export function saveFile(data, name, type = "application/octet-stream") {
  const address = URL.createObjectURL(data instanceof Blob ? data : new Blob([data], { type }));
  const link = html("a", { href: address, download: name }, document.body);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity", "font-size", "font-family", "font-weight", "text-anchor"];

/** A drawing as an image, with the styles that the page gives it. */
async function imageOf(drawing) {
  const copy = drawing.cloneNode(true);
  const [from, to] = [drawing, copy].map((root) => [root, ...root.querySelectorAll("*")]);
  from.forEach((node, i) => {
    const style = getComputedStyle(node);
    for (const name of STYLES) to[i].style.setProperty(name, style.getPropertyValue(name));
  });
  const { width, height } = drawing.getBoundingClientRect();
  for (const [name, value] of Object.entries({ xmlns: "http://www.w3.org/2000/svg", width, height })) copy.setAttribute(name, value);
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  return image;
}

/** Writes the text of an element where it stands on the page, broken into the same lines. */
function writeText(context, element, frame) {
  const style = getComputedStyle(element);
  const { left, top, width } = element.getBoundingClientRect();
  context.fillStyle = style.color;
  context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
  context.textBaseline = "top";
  const lines = [""];
  for (const word of element.textContent.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width <= width + 2 || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  const height = Number.parseFloat(style.lineHeight) || 18;
  lines.forEach((line, i) => context.fillText(line, left - frame.left, top - frame.top + i * height + 2));
}

/** Saves the figures inside an element as one PNG at twice their size, with their titles above them. */
export async function saveFigures(element, name) {
  const frame = element.getBoundingClientRect();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [2 * frame.width, 2 * frame.height];
  const context = canvas.getContext("2d");
  const style = getComputedStyle(element);
  context.scale(2, 2);
  context.fillStyle = style.getPropertyValue("--ground") || "#fff";
  context.fillRect(0, 0, frame.width, frame.height);
  for (const text of element.querySelectorAll("figcaption span")) writeText(context, text, frame);
  for (const drawing of element.querySelectorAll("svg")) {
    const { left, top, width, height } = drawing.getBoundingClientRect();
    context.drawImage(await imageOf(drawing), left - frame.left, top - frame.top, width, height);
  }
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  saveFile(blob, name);
}
