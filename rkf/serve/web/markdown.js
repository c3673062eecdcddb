// Turns an answer's Markdown into safe HTML. What the model writes is never trusted: DOMPurify has the last word.
import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import highlighter from "./vendor/highlight.min.js";

const escaped = (text) =>
  text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

const converter = (highlight) =>
  new Marked({
    gfm: true,
    breaks: true,
    renderer: {
      code({ text, lang }) {
        const language = highlighter.getLanguage(lang ?? "") ? lang : null;
        const body = highlight && language ? highlighter.highlight(text, { language }).value : escaped(text);
        return `<div class="code"><div class="code-bar"><span>${escaped(lang ?? "")}</span>
          <button type="button" class="copy">Copy</button></div><pre><code>${body}</code></pre></div>`;
      },
      html({ text }) {
        return escaped(text); // an answer about HTML shows its tags
      },
      image({ href, text }) {
        return `<a href="${escaped(href)}">${escaped(text || href)}</a>`; // nothing is loaded from elsewhere
      },
    },
  });

const finished = converter(true);
const growing = converter(false); // colours are worth their time once, at the end

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

/** HTML of a Markdown text; `done` is false while the text still grows. */
export function toHtml(text, done) {
  return DOMPurify.sanitize((done ? finished : growing).parse(text), {
    FORBID_TAGS: ["style", "form", "input", "textarea", "select", "img", "svg", "math", "video", "audio"],
    FORBID_ATTR: ["style", "id", "name"],
  });
}
