"use strict";
const study = document.body.dataset.study;
const form = document.getElementById("form");
const participant = document.getElementById("participant");
const total = form.querySelectorAll("fieldset").length;
const place = "captum_concepts.study." + study;

function ratings() {
  const found = {};
  for (const input of form.querySelectorAll("input:checked")) {
    const [item, question] = input.name.split(".");
    (found[item] ??= {})[question] = Number(input.value);
  }
  return found;
}

function changed() {
  const done = form.querySelectorAll("input:checked").length;
  document.getElementById("count").textContent = `${done} of ${total} ratings`;
  try {
    localStorage.setItem(place, JSON.stringify({ participant: participant.value, answers: ratings() }));
  } catch { /* a browser without storage forgets answers when the page is closed */ }
}

try {
  const kept = JSON.parse(localStorage.getItem(place) ?? "{}");
  participant.value = kept.participant ?? "";
  for (const [item, own] of Object.entries(kept.answers ?? {})) {
    for (const [question, value] of Object.entries(own)) {
      const input = form.querySelector(`input[name="${item}.${question}"][value="${value}"]`);
      if (input) input.checked = true;
    }
  }
} catch { /* see above */ }

form.addEventListener("change", changed);
participant.addEventListener("input", changed);
document.getElementById("save").addEventListener("click", () => {
  if (!participant.reportValidity()) return;
  const missing = [...form.querySelectorAll("fieldset")].find((one) => !one.querySelector("input:checked"));
  if (missing && !confirm("Some ratings are missing. Save all the same?")) {
    missing.querySelector("input").focus();
    return;
  }
  const text = JSON.stringify({ study, participant: participant.value.trim(), answers: ratings() }, null, 2);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `answers-${participant.value.trim().replace(/[^\p{L}\p{N}_-]+/gu, "_")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  forget(); // whoever opens the page next starts anew
});
document.getElementById("next").addEventListener("click", () => {
  if (!confirm("Remove the name and all ratings from this page?")) return;
  form.reset();
  participant.value = "";
  changed();
  forget();
  scrollTo(0, 0);
});

function forget() {
  try {
    localStorage.removeItem(place);
  } catch { /* see above */ }
}

changed();
