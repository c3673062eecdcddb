// The chat page: its state and its actions. What is on the screen lives in views.js.
import { html, render, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { listModels, streamAnswer } from "./client.js";
import * as store from "./store.js";
import { Composer, Header, Messages, SettingsDrawer, Sidebar } from "./views.js";

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

/** The request for a conversation's next answer. Empty settings are left out: the model's own defaults apply. */
function requestOf(conversation, settings, model) {
  const messages = conversation.messages
    .filter((message) => message.role === "user" || message.content)
    .map(({ role, content }) => ({ role, content }));
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const numbers = SAMPLING.filter((name) => settings[name] !== undefined && settings[name] !== "");
  return { model, messages, ...Object.fromEntries(numbers.map((name) => [name, Number(settings[name])])) };
}

const titleOf = (text) => text.trim().split("\n")[0].slice(0, 60) || "New chat";

function App() {
  const [conversations, setConversations] = useState(() => {
    const kept = store.loadConversations();
    return kept.length ? kept : [store.newConversation()];
  });
  const [currentId, setCurrentId] = useState(conversations[0].id);
  const [settings, setSettings] = useState(store.loadSettings);
  const [theme, setTheme] = useState(store.loadTheme);
  const [models, setModels] = useState([]);
  const [model, setModel] = useState("");
  const [key, setKey] = useState(() => sessionStorage.getItem("rkf.key") ?? "");
  const [busy, setBusy] = useState(false); // whether an answer grows
  const growing = useRef(null); // its AbortController
  const [problem, setProblem] = useState("");
  const [announcement, setAnnouncement] = useState("");
  const [drawerOpen, setDrawerOpen] = useState(false);
  const [sidebarOpen, setSidebarOpen] = useState(false);
  const composer = useRef(null);
  const current = conversations.find((conversation) => conversation.id === currentId) ?? conversations[0];

  useEffect(() => {
    document.documentElement.dataset.theme = theme;
    store.saveTheme(theme);
  }, [theme]);

  useEffect(() => {
    listModels(key).then(
      (names) => {
        setModels(names);
        setModel((chosen) => (names.includes(chosen) ? chosen : (names[0] ?? "")));
        setProblem("");
      },
      (error) => setProblem(error.status === 401 ? "The server wants an API key: set it in Settings." : error.message),
    );
  }, [key]);

  useEffect(() => {
    const onKey = (event) => {
      if (event.key === "Escape") growing.current?.abort();
      if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        startNew();
      }
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  });

  const show = (conversation) =>
    setConversations((all) => [conversation, ...all.filter((other) => other.id !== conversation.id)]);

  function keep(conversation) {
    show(conversation);
    try {
      store.saveConversation(conversation);
    } catch {
      setProblem("The browser's storage is full: delete some chats, or this one will be lost when the page closes.");
    }
  }

  function startNew() {
    const empty = conversations.find((conversation) => conversation.messages.length === 0) ?? store.newConversation();
    show(empty);
    setCurrentId(empty.id);
    setSidebarOpen(false);
    composer.current?.focus();
  }

  function remove(id) {
    store.deleteConversation(id);
    const rest = conversations.filter((conversation) => conversation.id !== id);
    const left = rest.length ? rest : [store.newConversation()];
    setConversations(left);
    if (id === current.id) setCurrentId(left[0].id);
  }

  /** Streams the answer to the last message of a conversation into it. */
  async function answer(conversation) {
    const controller = new AbortController();
    const reply = { role: "assistant", content: "", reasoning: "", state: "growing" };
    const withReply = () => ({
      ...conversation,
      changed: Date.now(),
      messages: [...conversation.messages, { ...reply }],
    });
    let firstAt = 0;
    let frame = 0;
    const draw = () => {
      frame = 0;
      show(withReply());
    };
    growing.current = controller;
    setBusy(true);
    setProblem("");
    setAnnouncement("Answering");
    keep(withReply());
    try {
      for await (const part of streamAnswer(requestOf(conversation, settings, model), key, controller.signal)) {
        if (part.content || part.reasoning) firstAt ||= performance.now();
        reply.content += part.content ?? "";
        reply.reasoning += part.reasoning ?? "";
        reply.finish = part.finish ?? reply.finish;
        if (part.usage) reply.tokens = part.usage.completion_tokens;
        frame ||= requestAnimationFrame(draw);
      }
      reply.state = reply.finish ? "done" : "failed";
      if (!reply.finish) reply.problem = "The connection ended before the answer did.";
    } catch (error) {
      reply.state = error.name === "AbortError" ? "stopped" : "failed";
      if (reply.state === "failed") reply.problem = error.message;
    }
    cancelAnimationFrame(frame);
    // The first token waits for the prompt: the rate is that of the tokens after it.
    if (reply.tokens > 1 && firstAt) reply.rate = ((reply.tokens - 1) * 1000) / (performance.now() - firstAt);
    growing.current = null;
    setBusy(false);
    keep(withReply());
    setAnnouncement(reply.content || reply.problem || "Stopped");
  }

  function send(text) {
    const first = current.messages.length === 0;
    const messages = [...current.messages, { role: "user", content: text }];
    answer({ ...current, title: first ? titleOf(text) : current.title, messages });
  }

  /** Replaces the user's message at `index` and drops what followed it. */
  function edit(index, text) {
    const messages = [...current.messages.slice(0, index), { role: "user", content: text }];
    answer({ ...current, title: index === 0 ? titleOf(text) : current.title, messages });
  }

  const retry = (index) => answer({ ...current, messages: current.messages.slice(0, index) });

  return html`
    <${Header}
      ...${{ models, model, setModel }}
      onMenu=${() => setSidebarOpen(!sidebarOpen)} onSettings=${() => setDrawerOpen(true)} />
    <${Sidebar}
      ...${{ conversations, currentId: current.id, open: sidebarOpen }}
      onNew=${startNew} onRemove=${remove} onClose=${() => setSidebarOpen(false)}
      onChoose=${(id) => { setCurrentId(id); setSidebarOpen(false); }} />
    <main>
      <${Messages} key=${current.id} messages=${current.messages} busy=${busy} onEdit=${edit} onRetry=${retry} />
      ${problem && html`<p class="problem" role="alert">${problem}</p>`}
      <${Composer} inputRef=${composer} busy=${busy} ready=${model !== ""} onSend=${send} onStop=${() => growing.current?.abort()} />
    </main>
    <${SettingsDrawer}
      ...${{ settings, theme, setTheme, apiKey: key, open: drawerOpen }}
      onSettings=${(changed) => { setSettings(changed); store.saveSettings(changed); }}
      onKey=${(changed) => { setKey(changed); sessionStorage.setItem("rkf.key", changed); }}
      onClose=${() => setDrawerOpen(false)} />
    <p class="unseen" role="status" aria-live="polite">${announcement}</p>
  `;
}

render(html`<${App} />`, document.body);
