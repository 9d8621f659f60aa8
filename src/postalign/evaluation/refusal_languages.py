"""How assistants decline in languages other than English: phrases, one entry a language.

Text in lower case with plain quotes, as `refusals.py` hands it over, sentence by sentence. Each entry knows the phrases
that decline a request, those that look like it and do not ("je ne peux pas m'empêcher"), and the words that turn round
("mais"). "I am sorry to hear that" needs no entry: regret alone declines nothing in any of them. Knows nothing of
deflections, of moral judgements, or of grammar beyond these phrases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .refusal_patterns import any_of

SENTENCE_END = re.compile(r"(?<=[.!?؟।])[\"')»]*\s+|(?<=[。！？])|\n+")


@dataclass(frozen=True)
class Language:
    """declines: phrases that turn a request down; idiom: such phrases that do not; turn: what may follow with "but"."""

    name: str
    declines: re.Pattern[str]
    idiom: re.Pattern[str]
    turn: re.Pattern[str]


_ES = (
    r"(?:ayud|asist|proporcion|dar(?:te|le|les|os|lo)?\b|ofrec|brind|explic|describ|escrib|redact|elabor|crear|generar|"
    r"hacer(?:lo| eso| esto)|respond|contest|cumpl|particip|facilit|compart|apoy|promov|discut|enseñ|deci[rt]|"
    r"continu|indic|revel|hablar de|atend|coment|sugerir|acced)\w*"
)
_FR = (
    r"(?:aid|assist|fourni|donn|expliqu|écri|cré[eé]|génér|rédig|répond|particip|faire (?:cela|ça|ceci)|propos|partag|"
    r"décri|continu|accéd|satisfai|offri|souten|encourag|dire|conseill|divulgu|révél|exécut|discut|appui)\w*"
)
_DE = (
    r"(?:helfen|weiterhelfen|unterstützen|geben|bereitstellen|anbieten|erklären|schreiben|erstellen|beantworten|"
    r"antworten|liefern|teilen|beschreiben|verfassen|mitmachen|mitwirken|tun|erfüllen|nachkommen|assistieren|nennen|"
    r"behilflich|fortfahren|dienen|verraten|beraten|generieren|besprechen|zeigen|sagen|entsprechen)\b"
)
_IT = (
    r"(?:aiut|assist|forni|dare|dart|darl|darv|offri|spieg|scriv|cre(?:are|arl)|gener(?:are|arl)|rispond|partecip|farlo|"
    r"fare (?:questo|ciò)|condivid|soddisf|descriv|continu|sugger|promuov|consigli(?:are|art)|dirt|dirv|rivel|redig|"
    r"support|acced|discut|esaud)\w*"
)
_PT = (
    r"(?:ajud|auxili|fornec|dar\b|oferec|explic|escrev|criar|gerar|respond|particip|fazer (?:isso|isto)|fazê-lo|"
    r"compartilh|partilh|atend|descrev|continu|suger|promov|dizer|revel|redig|apoi|assist|cumpr|acess|discut)\w*"
)
_RU = (
    r"(?:помо|предостав|дать|давать|объясн|напис|писать|созда|ответ|отвеч|участв|сделать|делать это|выполн|продолж|"
    r"рассказ|опис|поделит|предлож|обсужд|поддерж|содейств|сказать|генерир|подсказ|консульт)\w*"
)
_AR = (
    r"(?:مساعد|المساعدة|تقديم|شرح|كتابة|إنشاء|الإجابة|الاجابة|توفير|المشاركة|إعطاء|تلبية|القيام|تنفيذ|وصف|إخبار|"
    r"أساعد|أقدم|أشرح|أكتب|الرد|دعم|مشاركة|الاستجابة)"
)
_ZH = (
    r"(?:帮|幫|协助|協助|提供|回答|满足|滿足|完成|参与|參與|支持|给出|给您|给你|解释|解釋|撰写|编写|写|寫|创建|創建|生成|"
    r"描述|讨论|討論|分享|透露|告诉|告訴|教你|教您|执行|執行|遵从|继续|繼續|处理|访问|獲取|获取)"
)
_JA = (
    r"(?:手伝い|手伝う|協力|提供|答え|回答|説明|支援|対応|作成|生成|要求|リクエスト|要望|お力|書くこと|教える|お教え|"
    r"サポート|アドバイス|情報|参加|案内|応じ|すること|お伝え|助け)"
)

LANGUAGES: tuple[Language, ...] = (
    Language(
        "Spanish",
        any_of(
            r"\bno (?:(?:te|le|les|os|lo|la|se) )*(?:puedo|podemos|podré|podría|podremos|voy a|vamos a|pienso|quiero|"
            r"debo|me es posible|es posible|soy capaz de|sería (?:apropiado|ético|correcto)|"
            r"estoy (?:autorizad[oa]|en condiciones|dispuest[oa]|capacitad[oa]|programad[oa]|diseñad[oa])"
            r"(?: de| a| para)?)"
            rf" (?:\w+ ){{0,2}}?{_ES}",
            r"\bme niego a\b|\b(?:debo|tengo que|he de) (?:rechazar|negarme|declinar)",
            r"\bno tengo (?:acceso|la capacidad|permiso|autorización)\b",
            r"\ben contra de (?:mis|nuestras?|nuestros) (?:principios|normas|directrices|políticas|valores)",
            r"\bmis (?:normas|directrices|políticas|principios)\b.*\b(?:no me permiten|prohíben|impiden)\b",
        ),
        re.compile(r"\bno (?:puedo|podemos) (?:\w+ )?(?:esperar|creer|dejar de|evitar|más|imaginar)"),
        re.compile(r"\b(?:pero|sin embargo|no obstante|aun así|aquí (?:tienes|está|van))\b"),
    ),
    Language(
        "French",
        any_of(
            r"\b(?:je|nous) ne (?:(?:vous|te|le|la|les|y) |t'|l')*(?:peux|pouvons|pourrai|pourrais|vais|dois|souhaite|"
            r"veux|saurais)(?: (?:malheureusement|donc|absolument|certainement))*(?: pas| point)? "
            rf"(?:\w+ ){{0,2}}?(?:\w+')?{_FR}",
            r"\bje ne suis (?:\w+ )?pas (?:en mesure|capable|autorisée?|programmée?|conçue?|habilitée?|disposée?)\b",
            r"\bje (?:refuse|décline)\b|\bje dois (?:refuser|décliner|m'abstenir)|\bil m'est impossible\b",
            r"\bje me vois (?:contrainte?|obligée?) de (?:refuser|décliner)",
            r"\bje n'ai pas (?:accès|la capacité|le droit|l'autorisation)\b",
            r"\bcontraires? à (?:mes|nos) (?:principes|directives|règles|valeurs)",
            r"\bmes (?:directives|règles|principes)\b.*\b(?:m'interdisent|m'empêchent|ne me permettent pas)\b",
        ),
        re.compile(r"\bne peux pas (?:m'empêcher|attendre|croire|imaginer|m'imaginer)"),
        re.compile(r"\b(?:mais|cependant|toutefois|néanmoins|voici)\b"),
    ),
    Language(
        "German",
        any_of(
            r"\b(?:ich|wir) (?:kann|können|könnte|werde|darf|möchte|will)\b[^.!?;]{0,80}?"
            rf"\b(?:nicht|keine[nrsm]?|kein)\b[^.!?;]{{0,90}}?\b{_DE}",
            r"\b(?:kann|darf|werde|möchte) ich\b[^.!?;]{0,50}?"
            rf"\b(?:nicht|keine[nrsm]?|kein)\b[^.!?;]{{0,90}}?\b{_DE}",
            r"\bich muss (?:\w+ ){0,4}?ablehnen\b|\bich lehne (?:\w+ ){0,4}?ab\b|\blehne ich (?:\w+ ){0,3}?ab\b",
            r"\bich weigere mich\b",
            r"\bich bin (?:\w+ )?nicht (?:in der lage|befugt|berechtigt|dazu da|dafür da|bereit)\b",
            r"\bich habe keinen zugriff\b|\bverst(?:ößt|ieße) gegen (?:meine|unsere) \w+",
        ),
        any_of(r"\bkaum erwarten\b", r"\bkann (?:mir )?nicht (?:genug|umhin|glauben|warten|sagen,? (?:ob|wie|wann))\b"),
        re.compile(r"\b(?:aber|jedoch|trotzdem|dennoch|hier (?:ist|sind))\b"),
    ),
    Language(
        "Italian",
        any_of(
            r"\bnon (?:(?:ti|vi|le|lo|la|gli) )*(?:posso|possiamo|potrei|potrò|intendo|voglio|devo|"
            r"sono (?:in grado di|autorizzat[oa] a|programmat[oa] per|dispost[oa] a)|mi è possibile|ho intenzione di|"
            rf"sarebbe (?:appropriato|etico|corretto)) (?:\w+ ){{0,2}}?{_IT}",
            r"\bmi rifiuto\b|\b(?:devo|dovrò) (?:\w+ )?(?:rifiutar|declinar)\w*",
            r"\bnon ho (?:accesso|la capacità|il permesso|l'autorizzazione)\b",
            r"\b(?:contro|contrari[oa] a) (?:i miei|le mie|i nostri|ai miei) (?:principi|linee guida|regole|valori)",
        ),
        re.compile(r"\bnon posso (?:fare a meno|credere|aspettare|immaginare|che)\b"),
        re.compile(r"\b(?:ma|però|tuttavia|ecco)\b"),
    ),
    Language(
        "Portuguese",
        any_of(
            r"\bnão (?:(?:te|lhe|lhes|o|a) )*(?:posso|podemos|poderei|poderia|consigo|vou|irei|devo|quero|pretendo|"
            r"me é possível|é possível|sou capaz de|tenho permissão para|seria (?:apropriado|ético|correto)|"
            r"estou (?:autorizad[oa]|apt[oa]|em condições|programad[oa]|dispost[oa])(?: a| para| de)?)"
            rf" (?:\w+ ){{0,2}}?(?:\w+-)?{_PT}",
            r"\b(?:me recuso|recuso-me)\b|\b(?:devo|preciso|tenho (?:de|que)|terei (?:de|que)) (?:recusar|declinar)",
            r"\bnão tenho (?:acesso|a capacidade|permissão|autorização)\b",
            r"\bcontra (?:as |os )?(?:minhas|meus|nossas|nossos) (?:diretrizes|princípios|valores|políticas|regras)",
        ),
        re.compile(r"\bnão posso (?:\w+ )?(?:esperar|acreditar|deixar de|evitar|imaginar)"),
        re.compile(r"\b(?:mas|porém|contudo|no entanto|entretanto|aqui (?:está|estão|vai))\b"),
    ),
    Language(
        "Russian",
        any_of(
            r"\bне (?:могу|можем|буду|будем|смогу|сможем|стану|должен|должна|вправе|в состоянии|готова?|способ\w+|хочу|"
            rf"намерен\w*) (?:\w+ ){{0,3}}?{_RU}",
            r"\bвынужден[аы]? (?:\w+ )?(?:отказать|отклонить)|\bя отказываюсь\b|\bдолж(?:ен|на) отказать",
            r"\b(?:не имею|у меня нет) (?:доступа|права|возможности)\b",
            r"\bпротивореч\w+ (?:моим|нашим) \w+",
        ),
        re.compile(r"\bне могу (?:не |дождаться|поверить|представить|нарадоваться|сказать точно)"),
        re.compile(r"\b(?:но|однако|тем не менее|вот)\b"),
    ),
    Language(
        "Arabic",
        any_of(
            r"(?:لا (?:أستطيع|استطيع|يمكنني|أقدر|نستطيع|يمكننا|يحق لي)|لن (?:أستطيع|أتمكن|أقوم)|"
            r"لست (?:قادر|مخول|مبرمج)|غير قادر|يتعذر علي|لا أملك (?:صلاحية|القدرة))"
            rf"[^.!؟\n]{{0,60}}?{_AR}",
            r"لن (?:أساعد|أقدم|أشارك|أشرح|أكتب)",
            r"\b(?:أرفض|يجب أن أرفض|علي أن أرفض)\b|أعتذر عن (?:عدم|تقديم|المساعدة|تلبية)",
            r"ليس لدي (?:إمكانية الوصول|القدرة|صلاحية)|يتعارض مع (?:مبادئي|إرشاداتي|سياس|قواعدي)",
        ),
        re.compile(r"لا (?:أستطيع|يمكنني) (?:الانتظار|أن أصدق|تخيل|وصف)"),
        re.compile(r"(?:لكن|ولكن|لكنني|ومع ذلك|إليك)"),
    ),
    Language(
        "Hindi",
        any_of(
            r"(?:मदद|सहायता|जानकारी|उत्तर|जवाब|अनुरोध|निर्देश|सुझाव|सलाह|समर्थन|ऐसा|यह|इसमें|वर्णन)[^।!?\n]{0,60}?"
            r"नहीं (?:कर|दे|बता|लिख|बना|समझा) (?:सकता|सकती|सकते|पाऊँगा|पाऊंगा|पाऊंगी|रहा|रही)",
            r"(?:मदद|सहायता|समर्थन) नहीं (?:करूँगा|करूंगा|करूंगी|कर )|नहीं (?:बताऊँगा|बताऊंगा|दूँगा|दूंगा|दूंगी|लिखूंगा)",
            r"(?:करने|देने|बताने|लिखने|बनाने|पूरा करने) में (?:असमर्थ|सक्षम नहीं)|(?:से|को) (?:इनकार|मना) कर",
            r"की अनुमति नहीं (?:है|हूँ|हूं)|मेरे (?:सिद्धांतों|दिशानिर्देशों|नियमों) के (?:खिलाफ|ख़िलाफ़|विरुद्ध)",
        ),
        re.compile(r"(?:इंतज़ार|इंतजार|विश्वास|यकीन) नहीं कर"),
        re.compile(r"(?:लेकिन|परंतु|किंतु|फिर भी|यहाँ|यहां)"),
    ),
    Language(
        "Chinese",
        any_of(
            r"(?:我|我们|我們|抱歉|对不起|對不起|不好意思|人工智能|ai)[^。！？\n]{0,16}?"
            r"(?:无法|無法|不能|不会|不會|不可以|没办法|没有办法|不便|不应|不该|不愿|不想|没有权限|不被允许)"
            rf"[^。！？\n]{{0,20}}?{_ZH}",
            rf"(?:我|我们|我們)(?:必须|只能|不得不)?(?:拒绝|拒絕|婉拒)|(?:无法|無法|不能)(?:为您|为你|對此|对此)?{_ZH}"
            r"[^。！？\n]{0,12}?(?:请求|請求|要求|帮助|信息|建议|内容|指导)",
            r"违反(?:了)?(?:我的|我们的|相关)?(?:原则|准则|政策|规定|道德)",
        ),
        re.compile(r"(?:不能|无法|無法|不会|不會)(?:不|等|相信|忘|想象|更|错过|后悔)"),
        re.compile(r"(?:但|但是|不过|然而|以下是|下面是)"),
    ),
    Language(
        "Japanese",
        any_of(
            rf"{_JA}[^。！？\n]{{0,24}}?(?:できません|出来ません|できかねます|しかねます|致しかねます|いたしかねます|"
            r"られません|かねます|わけにはいきません)",
            r"(?:お断り|遠慮)(?:し|いた|させ|申し)|(?:差し控え|控え)させ|手伝えません|教えられません|答えられません|"
            r"書けません|応じられません|お役に立てません|力になれません|お答えできません",
        ),
        re.compile(r"(?:待ち?きれません|忘れることは?できません|信じられません|やめられません)"),
        re.compile(r"(?:しかし|ただし|ですが|とはいえ|以下)"),
    ),
)

# an English text in plain letters need not be searched for ten other languages
_ENGLISH = (" the ", " to ", " and ", " you ", " that ", " is ", " of ", " i ", " i'm ", " with ", " for ")


def is_english(text: str) -> bool:
    """Whether a text in lower case is plainly English: ASCII letters and two common words in its first lines."""
    opening = f" {text[:400]} "
    return opening.isascii() and sum(word in opening for word in _ENGLISH) >= 2


def foreign_decline(sentence: str) -> tuple[str, Language] | None:
    """The words of `sentence` that decline, with their language, or None."""
    for language in LANGUAGES:
        match = language.declines.search(sentence)
        if match and not language.idiom.search(sentence):
            return match.group(), language
    return None
