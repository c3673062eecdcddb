// What the chat page shows. Views get data and callbacks; they keep nothing but what is being typed.
import { html, useEffect, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.js";
import { toHtml } from "./markdown.js";

const FIELDS = [
  ["temperature", "Temperature", "0 to 2; 0 always takes the likeliest token", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "Top p", "the likeliest tokens that together have this probability", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "Top k", "at most this many of the likeliest tokens", { min: 0, step: 1 }],
  ["min_p", "Min p", "tokens at least this likely, relative to the likeliest", { min: 0, max: 1, step: 0.01 }],
  ["repetition_penalty", "Repetition penalty", "1 has no effect", { min: 0.1, max: 2, step: 0.05 }],
  ["max_tokens", "Longest answer", "in tokens", { min: 1, step: 1 }],
  ["seed", "Seed", "the same seed gives the same answer", { min: 0, step: 1 }],
];

async function copy(text, button) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed"; // browsers hide the clipboard from plain HTTP on other hosts
  }
  setTimeout(() => (button.textContent = before), 1500);
}

export function Header({ models, model, setModel, onMenu, onSettings }) {
  return html`
    <header>
      <button type="button" class="menu" aria-label="Chats" onClick=${onMenu}>☰</button>
      <label class="model">
        <span class="unseen">Model</span>
        <select value=${model} onChange=${(event) => setModel(event.target.value)}>
          ${models.map((name) => html`<option value=${name} selected=${name === model}>${name}</option>`)}
        </select>
      </label>
      <button type="button" onClick=${onSettings}>Settings</button>
    </header>
  `;
}

export function Sidebar({ conversations, currentId, open, onChoose, onNew, onRemove, onClose }) {
  return html`
    <nav class=${open ? "open" : ""} aria-label="Chats" onKeyDown=${(event) => event.key === "Escape" && onClose()}>
      <button type="button" class="primary" title="Ctrl+Shift+O" onClick=${onNew}>New chat</button>
      <ul>
        ${conversations.map(
          ({ id, title }) => html`
            <li key=${id} class=${id === currentId ? "current" : ""}>
              <button type="button" class="title" aria-current=${id === currentId ? "true" : undefined}
                onClick=${() => onChoose(id)}>${title}</button>
              <button type="button" class="remove" aria-label=${`Delete ${title}`} onClick=${() => onRemove(id)}>×</button>
            </li>
          `,
        )}
      </ul>
    </nav>
    ${open && html`<div class="shade" onClick=${onClose}></div>`}
  `;
}

export function Messages({ messages, busy, onEdit, onRetry }) {
  const list = useRef(null);
  const pinned = useRef(true); // scrolled to the end: stay there while the answer grows
  useLayoutEffect(() => {
    if (pinned.current) list.current.scrollTop = list.current.scrollHeight;
  });
  const onScroll = ({ target }) => {
    pinned.current = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
  };
  const onClick = ({ target }) => {
    if (target.classList.contains("copy")) copy(target.closest(".code").querySelector("code").textContent, target);
  };
  return html`
    <div class="messages" ref=${list} tabindex="0" role="log" aria-live="off" aria-label="Messages" onScroll=${onScroll}
      onClick=${onClick}>
      ${messages.length === 0 && html`<p class="empty">What would you like to know?</p>`}
      ${messages.map((message, index) =>
        message.role === "user"
          ? html`<${UserMessage} key=${index} text=${message.content} busy=${busy} onEdit=${(text) => onEdit(index, text)} />`
          : html`<${Answer} key=${index} ...${message} busy=${busy} onRetry=${() => onRetry(index)} />`,
      )}
    </div>
  `;
}

function UserMessage({ text, busy, onEdit }) {
  const [draft, setDraft] = useState(null); // null: not being edited
  const field = useRef(null);
  useEffect(() => field.current?.focus(), [draft === null]);
  const save = () => {
    setDraft(null);
    if (draft.trim()) onEdit(draft);
  };
  if (draft !== null) {
    return html`
      <article class="user" aria-label="You, editing">
        <textarea ref=${field} rows=${Math.min(12, draft.split("\n").length + 1)} aria-label="Edit the message" value=${draft}
          onInput=${(event) => setDraft(event.target.value)}
          onKeyDown=${(event) => event.key === "Escape" && setDraft(null)}></textarea>
        <div class="actions">
          <button type="button" class="primary" disabled=${busy} onClick=${save}>Send</button>
          <button type="button" onClick=${() => setDraft(null)}>Cancel</button>
        </div>
      </article>
    `;
  }
  return html`
    <article class="user" aria-label="You">
      <div class="text">${text}</div>
      <div class="actions">
        <button type="button" disabled=${busy} onClick=${() => setDraft(text)}>Edit</button>
        <button type="button" onClick=${(event) => copy(text, event.target)}>Copy</button>
      </div>
    </article>
  `;
}

const NOTES = { length: "Cut: the limit of tokens was reached.", stopped: "Stopped." };

function Answer({ content, reasoning, state, finish, problem, tokens, rate, busy, onRetry }) {
  const growing = state === "growing" && busy;
  const note = problem ?? NOTES[state === "stopped" ? "stopped" : finish];
  return html`
    <article class="answer" aria-label="Answer" aria-busy=${growing}>
      ${reasoning &&
      html`<details open=${growing && !content}><summary>Reasoning</summary><div class="text">${reasoning}</div></details>`}
      <div class="prose" dangerouslySetInnerHTML=${{ __html: toHtml(content, !growing) }}></div>
      ${growing && html`<span class="cursor" aria-hidden="true"></span>`}
      ${!growing && note && html`<p class=${state === "failed" ? "problem" : "note"}>${note}</p>`}
      ${!growing &&
      html`<div class="actions">
        <button type="button" disabled=${busy} onClick=${onRetry}>Retry</button>
        <button type="button" onClick=${(event) => copy(content, event.target)}>Copy</button>
        ${tokens > 0 && html`<span>${tokens} tokens${rate ? `, ${rate.toFixed(1)} tokens/s` : ""}</span>`}
      </div>`}
    </article>
  `;
}

export function Composer({ inputRef, busy, ready, onSend, onStop }) {
  const [text, setText] = useState("");
  useLayoutEffect(() => {
    const field = inputRef.current; // as high as its text, up to the limit in chat.css
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight}px`;
  }, [text]);
  useEffect(() => inputRef.current.focus(), []);
  const send = () => {
    if (busy || !ready || !text.trim()) return;
    onSend(text);
    setText("");
  };
  const onKeyDown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  };
  return html`
    <form class="composer" onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <textarea ref=${inputRef} rows="1" aria-label="Message" placeholder="Message"
        value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${onKeyDown}></textarea>
      ${busy
        ? html`<button type="button" class="primary" title="Escape" onClick=${onStop}>Stop</button>`
        : html`<button type="submit" class="primary" disabled=${!ready || !text.trim()}>Send</button>`}
    </form>
  `;
}

export function SettingsDrawer({ settings, onSettings, theme, setTheme, apiKey, onKey, open, onClose }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open]);
  const set = (name, value) => onSettings({ ...settings, [name]: value });
  return html`
    <dialog ref=${dialog} aria-labelledby="settings-title" onClose=${onClose}
      onClick=${(event) => event.target === dialog.current && onClose()}>
      <form method="dialog">
        <div class="dialog-head"><h2 id="settings-title">Settings</h2><button type="submit">Close</button></div>
        <label>System prompt
          <textarea rows="5" value=${settings.system ?? ""} onInput=${(event) => set("system", event.target.value)}></textarea>
        </label>
        <h3>Sampling</h3>
        <p class="note">Empty: the model's own recommendation.</p>
        ${FIELDS.map(
          ([name, label, hint, limits]) => html`
            <label key=${name}>${label}
              <input type="number" ...${limits} value=${settings[name] ?? ""} aria-describedby=${`hint-${name}`}
                onInput=${(event) => set(name, event.target.value)} />
              <small id=${`hint-${name}`}>${hint}</small>
            </label>
          `,
        )}
        <h3>Page</h3>
        <label>Colours
          <select value=${theme} onChange=${(event) => setTheme(event.target.value)}>
            <option value="auto">as the system</option><option value="light">light</option><option value="dark">dark</option>
          </select>
        </label>
        <label>API key
          <input type="password" autocomplete="off" value=${apiKey} onChange=${(event) => onKey(event.target.value.trim())} />
          <small>kept until this tab closes</small>
        </label>
        <p class="note">Keys: Enter sends, Shift+Enter starts a new line, Escape stops the answer, Ctrl+Shift+O starts a new chat.
          Chats are kept in this browser alone.</p>
      </form>
    </dialog>
  `;
}
