// A click on a node of the figure, Enter on it, or a choice from the list, shows its numbers. All strings are inserted as text, not as HTML.
{
  const nodes = JSON.parse(document.getElementById("node-data").textContent);
  const panel = document.getElementById("node"), choice = document.getElementById("node-choice");
  const element = (name, text, ...children) => {
    const made = document.createElement(name);
    made.append(text, ...children);
    return made;
  };
  const list = (title, edges) => [
    element("dt", title),
    ...(edges.length ? edges.map(edge => element("dd", `${edge.effect}  ${edge.node}`)) : [element("dd", "none")]),
  ];
  const show = number => {
    const node = nodes[number];
    choice.value = number;
    document.querySelectorAll("#graph g.node").forEach((each, n) => each.classList.toggle("chosen", n === number));
    const facts = element("dl", element("dt", "effect"), element("dd", node.effect));
    panel.replaceChildren(
      element("strong", node.name), facts,
      element("dl", "", ...list(`in (${node.arriving.length})`, node.arriving), ...list(`out (${node.leaving.length})`, node.leaving)),
    );
  };
  nodes.forEach((node, number) => choice.append(new Option(node.name, number)));
  choice.addEventListener("change", () => choice.value === "" ? panel.replaceChildren() : show(Number(choice.value)));
  for (const node of document.querySelectorAll("#graph g.node")) {
    node.addEventListener("click", () => show(Number(node.dataset.number)));
    node.addEventListener("keydown", event => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      show(Number(node.dataset.number));
    });
  }
}
