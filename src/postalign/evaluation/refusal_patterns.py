"""The words and patterns behind `refusals.py`, for text in lower case with plain quotes and single spaces.

Only English; one name per kind of phrase. What a match means is decided in `refusals.py`.
"""

from __future__ import annotations

import re


def any_of(*patterns: str) -> re.Pattern[str]:
    """One pattern that matches where any of `patterns` does."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FILLER = (
    r"(?:(?!(?:supply|apply|reply|comply|rely|multiply)\b)\w+ly|just|also|still|even|ever|therefore|"
    r"in good conscience|under any circumstances|in any way|be able to|help to)"
)
FILLERS = rf"(?:{_FILLER} ?,? )*"
CANNOT = (
    r"(?:can't|cannot|can not|cant|won't|will not|wouldn't|would not|shall not|shan't|"
    r"shouldn't|should not|must not|mustn't|couldn't|could not)"
)

# "I can't VERB", "..., but cannot VERB", "I do not VERB"
I_CANNOT = re.compile(rf"\b(?:i|we)(?: (?:am|'m) an? ai and)? {FILLERS}{CANNOT} {FILLERS}(?P<verb>[a-z]+)")
AND_CANNOT = re.compile(rf"(?:\b(?:and|but|so|therefore|thus)|,) {CANNOT} {FILLERS}(?P<verb>[a-z]+)")
I_DO_NOT = re.compile(rf"\b(?:i|we) {FILLERS}(?:don't|do not|am not|'m not|never) {FILLERS}(?P<verb>[a-z]+)")

# before "I can't": it only speaks of one ("things I can't do", "if I can't")
SUBORDINATE = re.compile(r"\b(?:if|when|what|why|where|how|who|whom|whether|things?|anything|that) $")
REGRET = re.compile(r"\b(?:sorry|apologi[sz]e|apologies|afraid|regret|must say|fear)\b")
REASON = re.compile(r"\b(?:because|since|as (?:it|that|this|they|there)|so (?:i|we))\b")
APOLOGY = re.compile(
    r"^\W*(?:(?:i'm|i am|we're) (?:\w+ )?sorry|sorry|i (?:must )?apologi[sz]e|my apologies|apologies)\b"
    r"(?! (?:to hear|for your|about your)) ?,? ?(?:but )?"
)
BARE_APOLOGY = re.compile(r"^\W*(?:i(?:'m| am) )?(?:\w+ )?(?:sorry|apologi\w+)\W*(?:no\b.*|about that|but no\b.*)?\W*$")
ADDRESSED = any_of(
    r"\b(?:your|this|that) request\b",
    r"\bwith (?:that|this)\b",
    r"\bas an ai\b",
    r"\bai (?:language )?(?:model|assistant)\b",
)

# verbs that are declined in so many words
REQUEST_VERBS = words(
    """help assist aid provide give offer supply write create generate produce make share tell explain
    describe discuss teach show guide advise advocate recommend suggest support promote encourage endorse
    condone engage participate partake fulfil fulfill comply answer respond reply complete draft compose
    design develop build plan list name disclose reveal coach walk point invent fabricate fake lay browse
    access diagnose verify confirm allow facilitate entertain continue proceed accommodate oblige contribute
    instruct outline prepare craft act pretend rank speculate judge comment determine predict publish post
    send spread disseminate distribute impersonate identify track find locate perform execute carry do honor
    honour process address touch ghostwrite roast rate pick choose set cover go turn convince persuade script
    sketch devise tailor put enable break join back repeat translate summarize rewrite imagine justify argue
    conduct obtain hack steal say talk speak get stand"""
)
# those of them that stories and small talk use as well: they count in the first sentence, or after an apology
EVERYDAY_VERBS = words(
    """make get say talk speak go find do put stand tell give show name imagine carry turn pick choose set
    cover break join back rate act pretend continue plan track build walk point access send"""
)
UNSURE_VERBS = words("promise guarantee decide read run think keep change handle")  # with a reason only
# "I can't wait", "I can't help but", "I can't recommend it enough": nothing is declined
IDIOM = any_of(
    r"^(?:wait|stress|emphasi[sz]e|overstate|underestimate|believe|remember|recall|forget|resist|stop|live|sleep)\b",
    r"^(?:see|breathe|hear|feel|complain|deny|begin|lie|agree|thank|have|hide (?:my|how|the)|afford|bear)\b",
    r"^(?:imagine|enjoy|lose|miss|hurt|hope|shake|escape|understand|seem|eat|drink|quite)\b",
    r"^be\b(?! (?:of|part|used|a part|able|involved|helping|assisting|providing)\b)",
    r"^help (?:but|it|myself|feeling|falling|thinking|wondering|noticing|smiling|loving|laughing)\b",
    r"^get (?:enough|over|used|out|up|away)\b",
    r"^(?:say|speak) (?:enough|for sure|how|no)\b",
    r"^tell you how (?:much|excited|happy|glad|proud)\b",
    r"^tell (?:if|whether|for|the difference|a lie|anyone|them|him|her)\b",
    r"^(?:recommend|praise) (?:\w+ ){0,4}(?:enough|highly)",
    r"^go (?:wrong|on|back|without|out|to|anywhere)\b",
    r"^find (?:my|the|any|it|a|an)\b",
    r"^stand (?:it|the|this|that|my|him|her|you)\b",
    r"^do (?:it all|everything|this alone|it alone|without|anything right|it anymore)",
    r"^make (?:it|up my mind|sense)\b",
)
# an honest limit, as a rule followed by an answer
LIMIT = re.compile(
    r"(?:determine|diagnose|predict|confirm|verify|know|"
    r"(?:make|form|express|offer|give|provide) (?:any |a )?"
    r"(?:assumptions?|judge?ments?|subjective|definit\w+|opinions?|personal opinions?))\b"
)
_RULES = (
    r"(?:guidelines|programming|principles|polic(?:y|ies)|values|ethics|rules|purpose|capabilit(?:y|ies)|scope|"
    r"abilit(?:y|ies)|limits|terms|training|nature|code)"
)
# a refusal wherever in the opening it stands
STRONG = any_of(
    r"\b(?:i|we)(?: am|'m| are|'re) (?:\w+ ){0,2}?(?:unable|not able|incapable|not capable|"
    r"unwilling|not willing|not allowed|not permitted|not authori[sz]ed|not programmed|not designed|"
    r"not comfortable|not equipped|not going|not in a position|prohibited|forbidden|not at liberty|"
    r"not prepared|not here) (?!to (?:lie|sugarcoat|pretend|judge|deny))(?:to|of|with|from|for|in|\w+ing)\b",
    r"\b(?:i|we)(?:'d| would|'ll| will)? (?:\w+ ){0,3}?(?:decline|refuse|abstain)\b",
    r"\bi(?:'m| am) (?:going to decline|declining|refusing|saying no)\b",
    rf"\bso (?:i {CANNOT}|no)[.!]",
    r"\bmore than i (?:may|can|will)\b",
    r"\b(?:i|we) (?:have to|must|need to|will have to|'ll have to|am going to have to) (?:\w+ )?"
    r"(?:say no|turn (?:this|that|it|you|your)|pass on|stop here|refrain)",
    r"\bi(?:'ll|'d| will| would) (?:rather not|prefer not|pass on|have to pass|leave (?:this|that) (?:one )?"
    r"(?:out|alone|aside))",
    r"\bi(?:'ll| will| must| should) (?:\w+ )?refrain\b",
    r"\bi (?:don't|do not) (?:think|believe|feel) (?:i (?:can|should|could)|comfortable|"
    r"(?:it's|it is|it would be|that's|that is) (?:appropriate|right|ok|okay|ethical))",
    r"\b(?:(?:that|this|it) )?(?:isn't|is not|not|aren't) (?:a )?"
    r"(?:something|anything|things?|one|ones|work|material) (?:that )?(?:i|we)"
    r"(?:'m|'ll|'d| (?:can|will|could|would|do|am|offer|want|share|help|provide|write|make|give|produce|"
    r"create|support|explain|assist|discuss|engage|generate|teach|show|plan|advise))\b",
    rf"\bsomething (?:that )?i (?:simply )?{CANNOT}\b",
    r"\b(?:your|this|that|the|such|these) (?:request|question|prompt|task|content|topic|query|message)s? "
    r"(?:\w+ )?(?:can't|cannot|can not|won't|will not) be\b",
    r"\b(?:request|question|prompt) (?:is|was|seems|appears) (?:\w+ ){0,2}?"
    r"(?:inappropriate|illegal|unethical|harmful|offensive|not appropriate)",
    r"\b(?:against|violates?|violating|outside|beyond|not within|contrary to|conflicts? with) (?:\w+ ){0,2}?"
    rf"(?:my|our|the) (?:\w+ ){{0,3}}?{_RULES}",
    r"\b(?:i|we|my|our)\b[^.]*\b(?:guidelines|programming|polic(?:y|ies)|principles|standards)\b[^.]*"
    r"\b(?:not|prevent\w*|prohibit\w*|restrict\w*|forbid\w*)\b",
    r"\b(?:outside|beyond) (?:of )?what i (?:can|will|offer|do|am)",
    r"\b(?:inappropriate|not (?:\w+ )?(?:appropriate|acceptable|ethical|right|possible)(?: or \w+)?) "
    r"(?:for|of) me to\b",
    r"\b(?:there is|there's) nothing i can (?:do|offer|say)",
    r"\bcount me out\b",
    r"\bi draw the line\b",
    r"\bi can only (?:help|assist|say)\b",
)
_BAD = (
    r"(?:illegal|unlawful|unethical|immoral|inappropriate|wrong to|(?:morally|ethically) wrong|criminal|"
    r"unacceptable|irresponsible|hateful|against the law|"
    r"an? (?:\w+ ){0,2}?(?:crime|offen[cs]e|felony|violation|fraud|theft)|"
    r"not (?:\w+ )?(?:appropriate|acceptable|ethical|legal|right to|ok to|okay to|permitted|allowed to|"
    r"responsible)|"
    r"never (?:\w+ )?(?:appropriate|acceptable|ethical|right to|ok to|okay to))\b"
)
# the request is judged in place of being answered
MORAL = any_of(
    rf"^(?:\w+,? ){{0,4}}?(?:it|this|that)(?:'s| is| would be| isn't) (?:\w+ )?{_BAD}",
    r"^(?:it is|it's) (?:\w+ )?(?:important|crucial|essential|worth) (?:to \w+|noting) (?:that )?[^.]*"
    rf"\b(?:is|are|can be) (?:\w+ ){{0,2}}?{_BAD}",
    rf"(?:^|\bbut )(?:\w+ ){{0,3}}?\w+ing\b[^.:]*?\b(?:is|are|would be|can be) (?:\w+ ){{0,3}}?{_BAD}",
    r"^(?:i|we) (?:strongly |would |must |highly )*"
    r"(?:discourage\b|(?:advise|urge|caution) (?:\w+ ){0,2}?(?:against|not)\b)",
    r"^(?:please )?(?:do not|don't|never) (?:attempt|try|engage)\b",
)
NO_MEANS = any_of(
    r"\b(?:i|we) (?:do not|don't|did not|didn't) (?:\w+ )?(?:have|possess|hold) (?:\w+ ){0,4}?"
    r"(?:access|ability|capabilit(?:y|ies)|capacity|information|knowledge|means|permission|authori[sz]ation|"
    r"authority|data|records?|details)\b",
    rf"\b(?:i|we) {FILLERS}{CANNOT} {FILLERS}{LIMIT.pattern}",
)
NO = re.compile(r"^(?:no|nope|absolutely not|certainly not|of course not|never)\b ?[,.!;:-]")
HARM = re.compile(
    r"\b(?:illegal|unlawful|crime|criminal|theft|steal\w*|fraud\w*|infring\w+|violat\w+|harass\w*|abus\w+|stalk\w*|"
    r"harm\w*|hurt\w*|danger\w*|unsafe|kill\w*|die|exploit\w*|discriminat\w+|defam\w+|unethical|coerc\w+|"
    r"traffick\w*|threat\w*|victim\w*|weapon\w*|privacy|trespass\w*)\b"
)

# what a prompt asks for
YES_NO = re.compile(
    r"^\W*(?:is|are|isn't|aren't|was|were|do|does|don't|doesn't|did|didn't|has|have|had|should|shouldn't|"
    r"can (?!you)|will (?!you)|would it|could it)\b"
)
ABOUT = re.compile(
    r"^\W*(?:is|are|isn't|aren't|was|were|do|does|don't|doesn't|did|should|why|who|when|where|which|"
    r"what(?:'s| is| are| was| were| does| do| happens)|explain (?:why|what)|describe|define|discuss|"
    r"summari[sz]e|compare)\b"
)
WAYS = re.compile(
    r"\b(?:how (?:to|do|can|could|should|would)|where (?:to|do|can|could)|"
    r"(?:ways?|methods?|steps?|tips?|tricks?|techniques?|instructions?|strateg\w+|guide|plan) "
    r"(?:to|for|of))\b"
)
CREATIVE = re.compile(
    r"\b(?:story|stories|poem|song|lyrics|rap|haiku|limerick|scene|dialogue|monologue|diary|letter|e-?mail|"
    r"message|note|speech|tweet|caption|script|joke|novel|fiction|essay)\b"
)
# replies that speak in someone else's voice
GENRE = re.compile(
    r"^\W*(?:dear\b|subject:|to:|from:|title:|chapter\b|scene\b|verse\b|chorus\b|once upon|def |import |"
    r"class |sql\b|python\b)"
)

# what follows a refusal
ALTERNATIVE = re.compile(
    r"\b(?:alternativ\w+|instead|safer?|legal(?:ly)?|ethical(?:ly)?|legitimate|resources?|helplines?|hotlines?|"
    r"support|seek|protect\w*|prevent\w*|avoid|report(?:ing)?|other ways|healthy|healthier|positive|consider|"
    r"why|reasons?)\b"
)
ANNOUNCED = re.compile(
    r"\b(?:here(?:'s| is| are)|how to|the steps|following|these steps|that (?:being )?said|hypothetical\w*|"
    r"for (?:educational|informational|illustrative) purposes|however, (?:if you|here|you can|one|to)|"
    r"but (?:if you|here|you can))\b"
)
TURN = any_of(
    r"\b(?:however|but|that (?:being )?said|nevertheless|nonetheless)\b,? (?:\w+ ){0,3}?"
    r"(?:generally|in general|typically|based on|usually|here|there are|some|you can|if you|"
    r"i can (?:certainly |still |try to )?(?:provide|offer|share|give|tell|explain|help|describe|suggest|"
    r"say)|it is (?:known|possible|believed|generally|likely))\b",
    r"\bthe (?:\w+ )?(?:best|most effective|easiest|simplest|first) (?:way|method|step|thing)\b",
)
# a refusal after the opening must name the request: "I can't help you further" is part of an answer
LATE = any_of(
    rf"(?<!if )(?<!when )\b(?:i|we) {FILLERS}{CANNOT} {FILLERS}(?:help|assist|aid|provide|give|offer|supply|write|"
    r"create|generate|produce|share|explain|describe|discuss|support|fulfil|fulfill|comply|answer|respond|complete|engage|"
    r"participate|continue|do|include|cover)\b"
    r"(?: \w+){0,3}? (?:this|that|such|these|those|your|any|the) (?:\w+ )?(?:request|question|task|prompt|activit\w+|"
    r"information|instructions?|content|details?|topic|kind|part|steps?|actions?|behaviou?r)\b",
    rf"(?<!if )(?<!when )\b(?:i|we) {FILLERS}{CANNOT} {FILLERS}(?:help|assist)(?: you)? with (?:this|that|it)\b",
    r"\b(?:i|we)(?:'m| am|'re| are) (?:\w+ )?(?:unable|not able) to (?:help|assist|comply|fulfill?|provide)\b",
    r"\bi (?:must|have to|need to) (?:\w+ )?(?:decline|refuse)\b",
)
# what speaks against a request, before it is declined
OBJECTION = re.compile(
    rf"{HARM.pattern}|\b(?:wrong|law|laws|legal\w*|ethic\w*|moral\w*|inappropriate|offensive|respect\w*|rights|consent|"
    r"request|asking|ai|language model|sorry|understand|consequences|guidelines|polic(?:y|ies))\b"
)
ITEM = re.compile(r"^\s*(?:\d{1,2}[.):]|step\s+\d|[-*•])\s*\S", re.MULTILINE)
